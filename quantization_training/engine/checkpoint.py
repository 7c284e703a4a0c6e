"""Checkpoints: files of tensors and plain containers, whole at every moment, read without running any code in them."""

import os

from sparsity.masks import checked_masks
from util.config import read_bytes
from util.errors import UserError, naming
from util.exchange import fit_names, write_atomically

from .serialization import check_entries, from_external, is_ours, pack, unpack

FORMAT_VERSION = 2
FIRST_WITH_CHECKSUM = 2


def save_checkpoint(path, checkpoint):
    """Write a checkpoint (tensors and plain containers) so that a whole file lies at `path` at every moment."""
    write_atomically(path, pack({"version": FORMAT_VERSION, **checkpoint}))


def load_checkpoint(path):
    """Read a checkpoint onto the CPU. No code in the file is run; errors name the file and what is wrong with it.

    Of a file of another program that holds weights this gives {'state_dict': ...} and those entries that are what ours are,
    without 'version'; its names lose the wrappers that all of them have.
    """
    data = read_bytes(path, "the checkpoint", limit=None)
    with naming(path):
        content, has_checksum = unpack(data, os.path.basename(path))
        if not has_checksum and not is_ours(content):
            content = from_external(content)
        elif not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
            raise UserError("not a checkpoint (it has no state_dict)")
        check_entries(content)
        if content.get("version", 0) > FORMAT_VERSION:
            raise UserError(f"written by a newer version of this project (format {content['version']})")
        if content.get("version", 0) >= FIRST_WITH_CHECKSUM and not has_checksum:
            raise UserError("damaged (its checksum is missing); use an earlier checkpoint")
    return content


def is_foreign(content):
    """Whether a checkpoint, as load_checkpoint gives it, was written by another program, such as LIMPQ."""
    return "version" not in content and "packed" not in content


def may_lack(content, name):
    """Whether the checkpoint of another program may lack the tensor of a name: what counts or marks, but computes nothing."""
    return is_foreign(content) and name.endswith((".num_batches_tracked", ".init_state"))


def masks_of(content, model, path):
    """The pruning masks that a checkpoint carries, {} where it has none; `model` is its full-precision network."""
    masks = content.get("masks", {})
    if is_foreign(content):
        names = fit_names(dict(model.named_parameters()), masks)
        masks = {names[name]: mask for name, mask in masks.items()}
    return checked_masks(model, masks, path)


def signedness_of(content):
    """{layer: whether its activations are signed}, as far as a checkpoint of either stage says; the first batch decided."""
    if "signed" in content:
        return content["signed"]
    return {name: row["signed"]["act"] for name, row in content.get("layers", {}).items() if row.get("signed")}
