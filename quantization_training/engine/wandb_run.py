"""The wandb run of a training. Nothing here asks a question, and nothing here stops a training that has begun."""

import os

from util.config import to_plain
from util.errors import UserError, reason

WANDB_INIT_TIMEOUT = 20  # seconds until a server out of reach is given up at the start
WANDB_FINISH_TIMEOUT = 60  # seconds for the last upload; what is left over stays on disk for `wandb sync`
WANDB_MODE_VARIABLE = {"online": "online", "run": "online", "shared": "online", "offline": "offline",
                       "dryrun": "offline", "disabled": "disabled"}


def choose_wandb(config):
    """(the wandb module or None; 'online', 'offline' or 'disabled'; a remark for the log or ''). Nothing is written; a mode
    that is asked for and cannot be had raises a UserError."""
    mode = config.mode
    if mode == "auto":
        mode = WANDB_MODE_VARIABLE.get(os.environ.get("WANDB_MODE", "").lower(), "auto")
    if mode == "disabled":
        return None, mode, ""
    wandb, problem = import_wandb()
    if wandb is None:
        if config.mode != "auto":
            raise UserError(f"wandb.mode: {config.mode!r} needs the package wandb ({problem}): pip install wandb, "
                            "or set wandb.mode to auto or disabled")
        return None, "disabled", f"no wandb ({problem}; pip install wandb)"
    if mode == "offline" or has_credentials(wandb):
        return wandb, "offline" if mode == "offline" else "online", ""
    if config.mode == "online":
        raise UserError("wandb.mode: 'online' needs an API key: run `wandb login`, set WANDB_API_KEY, "
                        "or set wandb.mode to auto or offline")
    return wandb, "offline", "wandb keeps the run offline (no API key configured)"


def import_wandb():
    """Return (the wandb module, '') or (None, why not)."""
    try:
        import wandb
    except Exception as error:  # a package broken by its dependencies fails in many ways
        return None, "not installed" if isinstance(error, ModuleNotFoundError) else reason(error)
    # A folder called wandb in the working directory imports as an empty package.
    return (wandb, "") if hasattr(wandb, "init") else (None, "not installed")


def has_credentials(wandb):
    """Whether a key for the wandb server is configured: by environment, wandb's settings, or a netrc file."""
    try:
        from requests.utils import get_netrc_auth  # wandb brings it along

        # Silent from here on: finding a key is announced on stderr otherwise.
        settings = wandb.setup(wandb.Settings(silent=True)).settings
        return bool(settings.api_key or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
                    or get_netrc_auth(settings.base_url))
    except Exception:  # settings that wandb cannot read will do no better when the run starts
        return False


def start_wandb(wandb, mode, folder, config, wandb_id, log):
    """Start or continue the wandb run, offline where the server is out of reach; None where that fails too."""
    for attempt in [mode, "offline"] if mode == "online" else ["offline"]:
        try:
            run = init_wandb(wandb, attempt, folder, config, wandb_id)
        except Exception as error:
            log(f"wandb does not start {attempt}: {reason(error)}")
            continue
        log(f"wandb: {attempt}, run {run.id}" + (f", {run.url}" if attempt == "online" and run.url else ""))
        return run
    return None


def init_wandb(wandb, mode, folder, config, wandb_id):
    wanted = {"silent": True, "console": "off", "init_timeout": WANDB_INIT_TIMEOUT,
              "finish_timeout": WANDB_FINISH_TIMEOUT, "finish_timeout_raises": True}
    # Older releases of wandb lack some of the settings.
    settings = wandb.Settings(**{name: value for name, value in wanted.items() if hasattr(wandb.Settings(), name)})
    run = wandb.init(mode=mode, dir=str(folder), id=wandb_id, name=config.name, config=to_plain(config),
                     resume="allow" if wandb_id and mode == "online" else None, project=config.wandb.project,
                     entity=config.wandb.entity, tags=config.wandb.tags, settings=settings)
    run.define_metric("epoch")
    run.define_metric("*", step_metric="epoch")
    return run
