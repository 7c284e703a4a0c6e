"""Continuing a run of fine-tuning that LIMPQ's own code wrote."""

from functools import partial

import torch

from model.weights import fit, is_step, load_state
from util.errors import UserError, reason

from .checkpoint import may_lack
from .training_state import ResumeState, check_optimizer

MOMENTA = {torch.optim.SGD: {"momentum_buffer"}, **dict.fromkeys((torch.optim.Adam, torch.optim.AdamW),
                                                                 {"step", "exp_avg", "exp_avg_sq"})}  # by parameter


def continue_limpq_run(content, model, optimizer, path):
    """Go on from a checkpoint that LIMPQ's fine-tuning wrote; return the ResumeState. Its epochs count from 0, and its
    optimizer has the parameters without weight decay in a group before the others. An optimizer of another kind, or of other
    parameters, is refused."""
    def stop(why):
        return UserError(f"{path}: holds no run to continue ({why}); resume.lean: true takes its weights only")

    if not {"epoch", "optimizer"} <= content.keys() or not any(map(is_step, content["state_dict"])):
        raise stop("it is not one of this project's, nor one of LIMPQ's fine-tuning with its epoch and optimizer")
    try:
        weights = fit(model.state_dict(), content["state_dict"])
        state = _momenta_by_name(content["optimizer"], weights, dict(model.named_parameters()))
        trained = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        positions = {name: trained.index(id(own)) for name, own in model.named_parameters() if id(own) in trained}
        if any(entry.keys() != MOMENTA.get(type(optimizer)) for entry in state.values()):
            raise ValueError("its optimizer is another one")
        load_state(model, content["state_dict"], path, partial(may_lack, content))
        optimizer.load_state_dict({"state": {positions[name]: entry for name, entry in state.items()},
                                   "param_groups": optimizer.state_dict()["param_groups"]})
        check_optimizer(optimizer)
    except UserError:
        raise
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError, AttributeError) as error:
        raise stop(reason(error)) from None
    scores = content.get("extras", {})
    best = tuple(float(scores[key]) if isinstance(scores.get(key), (int, float)) else -1.0 for key in ("top1", "top5"))
    return ResumeState(content["epoch"] + 1, best, remark=f"{path} is LIMPQ's: epoch, weights, step sizes and optimizer go "
                                                          "on, random numbers begin anew")


def _momenta_by_name(optimizer, state, parameters):
    """{name: what the optimizer keeps of a parameter}, from the state_dict of LIMPQ's optimizer, that of the network in the
    file, in its order, and the {name: parameter} of the network."""
    ordered = [name for name in state if name in parameters]
    groups = [group["params"] for group in optimizer["param_groups"]]
    plain = [name for name in ordered if parameters[name].dim() <= 1 or name.endswith(".bias")]
    names = [ordered] if len(groups) == 1 else [plain, [name for name in ordered if name not in set(plain)]]
    if [len(group) for group in groups] != [len(group) for group in names]:
        raise ValueError("its optimizer has other parameters")
    owners = {index: name for group, part in zip(groups, names, strict=True) for index, name in zip(group, part, strict=True)}
    return {owners[index]: entry for index, entry in optimizer["state"].items()}
