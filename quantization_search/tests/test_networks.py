"""Indicators of networks from elsewhere: the search takes their table, and runs no code that a file names."""

import pytest
from conftest import content

import search
from network import find_network, read_tables
from util.errors import UserError
from util.exchange import read_indicators

WORDS = ["--b", "4", "3", "2", "--wb", "3", "--ab", "3", "--cr", "0", "--bops", "True"]
ARCH = "../mine/net.py:make"


def network(path, model=None):
    return find_network(path, read_indicators(path), model)


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A file of that name, which leaves a trace when it is run."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "stage").mkdir()
    monkeypatch.chdir(tmp_path / "stage")
    (tmp_path / "mine" / "net.py").write_text(
        f"open({str(tmp_path / 'trace')!r}, 'w').close()\nfrom torch import nn\ndef make(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), *(nn.Conv2d(4, 4, 1) for _ in range(4)), "
        "nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))\n")
    return tmp_path / "trace"


@pytest.mark.parametrize("model", [None, ARCH, "/elsewhere/net.py:make"])
def test_a_network_from_a_file_is_searched_by_its_table(save, canary, capsys, model):
    path = save({**content(), "arch": ARCH})
    search.main(["--i", path, *WORDS, *(["--model", model] if model else [])])
    assert "searched weight bit-widths [" in capsys.readouterr().out and not canary.exists()


@pytest.mark.parametrize("model", ["resnet20", "../mine/net.py:other", "../mine/model.py:make", "timm:resnet18"])
def test_another_model_than_that_of_the_file_is_refused(save, model):
    with pytest.raises(UserError, match=f"model: found '{model}', but the indicators in .* are those of '{ARCH}'"):
        network(save({**content(), "arch": ARCH}), model)


def test_a_file_without_a_table_cannot_name_the_code_to_run(save, canary):
    bare = {key: value for key, value in content().items() if key not in ("layers", "fixed")} | {"arch": ARCH}
    with pytest.raises(UserError, match="is built by a file .* and the layer table is missing; extract the indicators again"):
        network(save(bare))
    assert not canary.exists()


@pytest.mark.parametrize("said", [{}, {"arch": ARCH}])
def test_the_user_may_name_code_to_build_the_table_from(save, canary, said):
    names = [str(index) for index in range(1, 5)]
    rows = dict.fromkeys(names, {"4": 0.1, "3": 0.2, "2": 0.4})
    path = save({"weight": rows, "act": rows, "layer_name": names, **said})
    assert list(network(path, ARCH).rows) == names and canary.exists()


def test_products_of_attention_are_reported_and_in_no_bitops(save, capsys):
    said = []
    for products in ({}, {"products": {"block.attention": 1_500_000, "other": 500_000}}):
        search.main(["--i", save({**content(), **products}), *WORDS])
        said.append(capsys.readouterr().out.splitlines())
    line = "non-layer MACs: 0.002 G in full precision, in no BitOPs"
    assert line in said[1] and [other for other in said[1] if other != line] == said[0]


@pytest.mark.parametrize("products", [[], {"a": -1}, {"a": "many"}, {"a": True}, 5])
def test_products_that_are_none_are_refused(save, products):
    with pytest.raises(UserError, match="products"):
        network(save({**content(), "products": products}))


def test_indicators_with_limpqs_names_of_mobilenetv1_are_those_of_ours(save):
    depths, parts = [1, 2, 2, 6, 2], ("dw_conv", "pw_conv")
    names = [f"module.features.stage{stage}.unit{unit}.{part}.conv" for stage, depth in enumerate(depths, 1)
             for unit in range(1, depth + 1) for part in parts]
    table = {name: {"4": float(index), "2": index + 1.0} for index, name in enumerate(names)}
    path = save({"layer_name": names, "weight": table, "act": table})
    indicators = read_indicators(path)
    network = find_network(path, indicators, "mobilenetv1")
    assert list(network.rows) == list(read_tables()["mobilenetv1"])[1:-1]
    assert [indicators["weight"][name][4] for name in network.rows] == list(range(26))
