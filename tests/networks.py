"""Many networks through all stages, packed and folded, on a few small images: what works, and what stays in full precision.

python tests/networks.py [--resume] [--jobs N] [--limit SECONDS]   # all; writes measurements/networks.csv, docs/networks.md
python tests/networks.py timm:resnet26t [--size 64]                # one of them, or any other, alone

Each network has processes of its own, so that a crash is a row. It has passed where every stage ends well, the bit-packed
model gives the logits of its checkpoint, bit for bit, and each folded layer nearly so; it is refused where one line says so
before anything is trained. `--resume` keeps the rows that are there.
"""

import argparse
import csv
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import every_network
import forked

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
TABLE, PAGE = ROOT / "measurements" / "networks.csv", ROOT / "docs" / "networks.md"
ODD = "odd_networks.py"
FOLDING_MAY_CHANGE = 0.01  # of a layer's output, in bfloat16 too; errors add up in logits
COLUMNS = ("network", "size", "result", "line", "layers", "weights", "left_share", "left", "products_share", "folded",
           "layer_change", "logit_change",
           "seconds")
# {input size: networks}: the smallest member of each family, at the smallest size that it takes
NETWORKS = {
    32: """convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet mnasnet0_5 mobilenet_v2 mobilenet_v3_small
        regnet_x_400mf regnet_y_400mf resnet18 resnext50_32x4d wide_resnet50_2 shufflenet_v2_x0_5 squeezenet1_1 swin_t
        swin_v2_t vgg11 vgg11_bn vit_b_16 resnet20 mobilenetv1 vit_tiny_patch16_224 vit_tiny_patch4_32 timm:resnet10t
        timm:resnet26t timm:ghostnet_050 timm:mobileone_s0 timm:repvgg_a0 timm:hrnet_w18_small timm:dla46x_c timm:dpn48b
        timm:res2net50_48w_2s timm:resnest14d timm:skresnet18 timm:ecaresnet26t timm:coatnet_pico_rw_224 timm:coat_tiny
        timm:coat_lite_tiny timm:deit_tiny_distilled_patch16_224 timm:beit_base_patch16_224 timm:cait_xxs24_224
        timm:xcit_nano_12_p16_224 timm:mixer_s32_224 timm:gmlp_ti16_224 timm:resmlp_12_224 timm:convmixer_768_32
        timm:poolformer_s12 timm:caformer_s18 timm:efficientformerv2_s0 timm:edgenext_xx_small timm:fastvit_t8
        timm:mobilevit_xxs timm:mobilevitv2_050 timm:levit_128s timm:nest_tiny timm:pvt_v2_b0 timm:twins_svt_small
        timm:tnt_s_patch16_224 timm:visformer_tiny timm:volo_d1_224 timm:sequencer2d_s timm:vovnet39a
        timm:ese_vovnet19b_slim_dw timm:selecsls42b timm:tresnet_m timm:eca_nfnet_l0 timm:nf_regnet_b0 timm:cspresnet50
        timm:cs3darknet_s timm:darknet17 timm:lambda_resnet26t timm:botnet26t_256 timm:gernet_s timm:tinynet_e timm:lcnet_035
        timm:fbnetc_100 timm:hardcorenas_a timm:rexnet_100 timm:repghostnet_050 timm:starnet_s050 timm:inception_next_atto
        timm:davit_tiny timm:focalnet_tiny_srf timm:hiera_tiny_224 timm:efficientvit_b0 timm:efficientvit_m0 timm:repvit_m0_9
        timm:tiny_vit_5m_224 timm:mambaout_femto timm:legacy_xception timm:legacy_seresnet18 timm:convit_tiny
        timm:eva02_tiny_patch14_224 timm:fasternet_t0 timm:pit_ti_224 timm:shvit_s1 timm:swiftformer_xs
        timm:mobilenetv4_conv_small_035 timm:resnetv2_50x1_bit timm:test_byobnet timm:test_efficientnet timm:test_vit
        timm:vit_tiny_r_s16_p8_224 timm:swinv2_tiny_window8_256 timm:convnextv2_atto timm:efficientnet_cc_b0_4e
        timm:mixnet_s""",
    64: """alexnet""",
    96: """inception_v3""",
    224: """maxvit_t""",
    240: """timm:crossvit_9_240""",
    256: """timm:halonet26t""",
}


def all_networks():
    """{name in the table: input size}"""
    sys.path.insert(0, str(TESTS))
    import odd_networks

    listed = {name: size for size, names in NETWORKS.items() for name in names.split()}
    return listed | {f"{ODD}:{name}": odd_networks.SIZE for name in odd_networks.ALL}


def walk(name, size, limit):
    """The row of one network, and what its processes printed where it has not passed."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place, short = Path(folder), re.sub(r"\W", "_", name)
        every_network.write_images(place / "images")
        arch = str(TESTS / name) if name.startswith(ODD) else name
        (place / "networks.json").write_text(json.dumps([[short, arch, size, "auto"]]))
        row, printed = {"network": name, "size": size, "result": "passed"}, ""
        for stage in ("pretraining", "search", "training,packing"):
            line, printed = run_stage(stage, place, limit - (time.monotonic() - began))
            if line:
                is_early = stage == "pretraining" and not list(place.rglob("*.pth.tar"))
                row.update(result="refused" if is_early and line.startswith("error: ") else "failed",
                           line=line.removeprefix("error: ").replace(f"{TESTS}{os.sep}", "").replace(folder, "PLACE"))
                break
        else:
            row.update(judged(json.loads((place / f"{short}.json").read_text())))
    return row | {"seconds": round(time.monotonic() - began)}, printed


def run_stage(stages, place, limit):
    """(what went wrong in one line, or '', what was printed)."""
    try:
        done = forked.run(ROOT / every_network.STAGES[stages.split(",")[0]], TESTS / "every_network.py", stages, place,
                          limit=max(limit, 1))
    except subprocess.TimeoutExpired:
        return f"{stages}: not ready in time", ""
    printed = f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    if not done.returncode:
        return "", printed
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    if done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr:
        return errors[0] if stages == "pretraining" else f"{stages}: {errors[0]}", printed
    if done.returncode < 0:
        return f"{stages}: died of {signal.Signals(-done.returncode).name}", printed
    return f"{stages}: exit status {done.returncode}, {(done.stderr.splitlines() or ['nothing'])[-1][:200]}", printed


def judged(facts):
    """What the table says of a network that came to its end."""
    row = {key: f"{facts[key]:.3g}" if isinstance(facts[key], float) else facts[key] for key in COLUMNS if key in facts}
    kinds = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in facts["left"])
    row["left"] = ", ".join(list(kinds)[:3]) + (f" and {len(kinds) - 3} more" if len(kinds) > 3 else "")
    if not facts["is_equal"]:
        row.update(result="failed", line="the bit-packed model gives other logits than its checkpoint")
    elif not facts["layer_change"] <= FOLDING_MAY_CHANGE:
        row.update(result="failed", line=f"folding changes a layer's output by {facts['layer_change']:.3g} of the largest")
    return row


# ---------------------------------------------------------------------------------------------------------------------
# The table.


def read_rows():
    if not TABLE.exists():
        return {}
    with open(TABLE, encoding="utf-8", newline="") as file:
        return {row["network"]: row for row in csv.DictReader(file)}


def write_table(rows):
    with open(TABLE, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(rows), encoding="utf-8")


def page(rows):
    """The table to read."""
    counts = {result: sum(row["result"] == result for row in rows) for result in ("passed", "refused", "failed")}
    lines = ["# Which networks work", "",
             "This page lists which networks pass all stages, and what of each stays in full precision.",
             "It is made by `make networks` (`tests/networks.py`) from [its rows](../measurements/networks.csv); "
             "`python tests/networks.py NAME` runs one row.",
             "Each network, with random weights, was jointly trained for two steps on eight small images, its indicators were "
             "extracted, its bits searched;",
             "then it was fine-tuned for two steps, evaluated, and exported, without and with `--fold-bn`. The "
             "bit-packed model gives the logits of the checkpoint, bit for bit.", "",
             ", ".join(f"{count} {result}" for result, count in counts.items()) + ".", ""]
    for title, kind in (("torchvision and this project", ""), ("timm", "timm:"), (f"tests/{ODD}", ODD)):
        chosen = [row for row in rows if kind_of(row) == kind]
        lines += [f"## {title}", "",
                  "| network | images | result | layers | weights | left in full precision | attention's share of MACs | "
                  "folded: BatchNorms, largest change of a layer's output, of a logit | seconds |",
                  "|---|---|---|---|---|---|---|---|---|", *map(line_of, chosen), ""]
    return "\n".join(lines)


def kind_of(row):
    return next((kind for kind in ("timm:", ODD) if row["network"].startswith(kind)), "")


def line_of(row):
    row = {key: str(value) for key, value in row.items()}
    name = row["network"].removeprefix(kind_of(row)).removeprefix(":")
    if row["result"] != "passed":
        said = row["line"].replace("|", "\\|")
        return f"| {name} | {row['size']}² | **{row['result']}**: {said} | | | | | | {row['seconds']} |"
    left = f"{percent(row['left_share'])}: {row['left']}" if row["left"] else "-"
    folded = f"{row['folded']}, {row['layer_change']}, {row['logit_change']}" if row["folded"].isdigit() else row["folded"]
    return (f"| {name} | {row['size']}² | passed | {row['layers']} | {int(row['weights']) / 1e6:.2f} M | {left} | "
            f"{percent(row['products_share'])} | {folded} | {row['seconds']} |")


def percent(share):
    return f"{100 * float(share):.2g} %" if float(share) else "-"


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK")
    parser.add_argument("--resume", action="store_true", help="leave out what has a row")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=int, default=900, metavar="SECONDS", help="for one network (default: 900)")
    parser.add_argument("--size", type=int, default=64, help="of the images of a network that is not in the list")
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", WANDB_MODE="disabled")
    forked.PROCESSES.set_forkserver_preload([*forked.PRELOADED, "timm"])
    listed, rows = all_networks(), read_rows()
    chosen = {name: listed.get(name, options.size) for name in options.networks or listed}
    if importlib.util.find_spec("timm") is None and not options.networks:
        print("timm is not installed: its networks are left out, and keep the rows that they have")
        chosen = {name: size for name, size in chosen.items() if not name.startswith("timm:")}
    if options.resume:
        chosen = {name: size for name, size in chosen.items() if name not in rows}
    failed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        walks = pool.map(lambda name: walk(name, chosen[name], options.limit), chosen)
        for name, (row, printed) in zip(chosen, walks, strict=True):
            print(" ".join(f"{row.get(key, '')}" for key in ("network", "result", "line", "seconds")), flush=True)
            if row["result"] == "failed" or options.networks:
                print(printed, flush=True)
            failed += row["result"] == "failed"
            if name in listed:
                rows[name] = row
                write_table([rows[name] for name in listed if name in rows])
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
