"""Whether two runs left the same: tests of exact resume stand on it."""

import torch


def assert_equal_folders(one, other):
    """Two run folders hold the same checkpoints, with the same bytes in every tensor, the same metrics.csv, but for the
    seconds, and the same summary.yaml; what a name says of its folder set aside."""
    names = sorted(path.name.replace(one.name, other.name) for path in one.glob("*.pth.tar"))
    assert names == sorted(path.name for path in other.glob("*.pth.tar"))
    for path in one.glob("*.pth.tar"):
        assert_equal_states(path, other / path.name.replace(one.name, other.name))
    rows = [[line.rpartition(",")[0] for line in (folder / "metrics.csv").read_text().splitlines()] for folder in (one, other)]
    assert rows[0] == rows[1]
    assert (one / "summary.yaml").read_text().replace(one.name, other.name) == (other / "summary.yaml").read_text()


def assert_equal_states(path, other):
    """Two checkpoints after an epoch have the same bytes in every tensor."""
    states = [torch.load(file, weights_only=True) for file in (path, other)]
    assert "inside" not in states[1]
    assert states[0].keys() == states[1].keys()
    for key in states[0].keys() - {"config", "wandb_id"}:
        assert as_bytes(states[0][key]) == as_bytes(states[1][key]), f"{path}: {key}"


def as_bytes(value):
    """A nest of containers with tensors as bytes, to be compared."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: as_bytes(element) for key, element in value.items()}
    return [as_bytes(element) for element in value] if isinstance(value, (list, tuple)) else value
