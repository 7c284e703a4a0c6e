"""Write a fine-tuned network as a packed model or as ONNX, show a packed model, classify images with one, or time it.

python export.py CHECKPOINT --output model.safetensors [--fold-bn] [--onnx model.onnx] [--report report.html]
python export.py model.safetensors --onnx model.onnx [--profile integer] [--qonnx quant_nodes.onnx]
python export.py --inspect model.safetensors
python export.py --predict model.safetensors IMAGE...
python export.py --benchmark model.safetensors [--batch N ...] [--threads N] [--latency-table TABLE.csv]
"""

from util.errors import user_errors_on_one_line  # first, for Ctrl-C

# isort: split

import argparse
import os

from packed_file import parse_packed, read_packed, serialize
from util.command import Parser
from util.errors import UserError, is_out_of_memory, naming, reason
from util.exchange import check_outputs, split_arch, write_atomically

SHOWN_CLASSES = 3
CHECKED_IMAGES = 4
SLIGHT = 1e-3  # of the largest logit
DISTURBANCE, DRAWS, MARGIN = 1e-5, 8, 2  # relative, of the inputs of layers; how often; and how much more is rounding still
COMMANDS = {"benchmark": ("batch", "threads", "latency_table", "arch"), "predict": ("files", "arithmetic", "arch"),
            "inspect": ()}  # and what may stand beside them
WRITTEN = {"output": "packed models", "report": "reports", "onnx": "ONNX models", "qonnx": "ONNX models",
           "latency_table": "tables"}
LARGEST_NUMBER = 2**16  # of images, or threads
PARTS = ("packed weights", "BatchNorm", "biases", "step sizes", "other tensors", "header")


def main(arguments=None):
    options = parse(arguments)
    check_outputs_of(options)
    try:
        if options.inspect:
            print(describe_layers(read_packed(options.inspect)))
        elif options.predict:
            predict(options.predict, options.files, options.arch, options.arithmetic)
        elif options.benchmark:
            time_network(options)
        else:
            export(options)
    except Exception as error:
        if isinstance(error, UserError) or not is_out_of_memory(error):
            raise
        remedy = "lower --batch" if options.benchmark else "give fewer images" if options.predict else "close other programs"
        raise UserError(f"out of memory ({reason(error)[:80]}); {remedy}") from None


def parse(arguments):
    """Read and check the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("files", nargs="*", metavar="CHECKPOINT | IMAGE", help="a checkpoint of main.py; images to classify")
    parser.add_argument("--output", metavar="FILE.safetensors", help="the packed model to write")
    parser.add_argument("--onnx", metavar="FILE.onnx", help="the ONNX model to write; needs requirements-export.txt")
    parser.add_argument("--profile", choices=("qdq", "integer"), default="qdq",
                        help="what --onnx multiplies: qdq, dequantized values; integer, integers, in onnxruntime")
    parser.add_argument("--qonnx", metavar="FILE.onnx", help="the QONNX model to write; needs requirements-export.txt")
    parser.add_argument("--report", metavar="FILE.html", help="a page about the packed model; needs --output")
    parser.add_argument("--fold-bn", action="store_true", help="fold each BatchNorm into the convolution before it")
    parser.add_argument("--inspect", metavar="FILE", help="print the layers of a packed model; nothing is rebuilt or run")
    parser.add_argument("--predict", metavar="FILE", help="classify images with a packed model")
    parser.add_argument("--arithmetic", choices=("auto", "integer", "float"), default="auto",
                        help="how --predict computes: auto, integers where a layer fits and float elsewhere; integer, which "
                             "refuses where no layer fits; float, the checkpoint's values bit for bit")
    parser.add_argument("--config", metavar="FILE.yaml", help="the configuration of a checkpoint without, as LIMPQ's")
    parser.add_argument("--arch", metavar="FILE.py:FACTORY",
                        help="your own network's file, which is run; needed where the network is one of your own")
    add_timing(parser)
    options = parser.parse_intermixed_args(arguments)
    check_together(parser, options)
    if options.profile == "integer" and not options.onnx:
        parser.error("--profile: is about an ONNX model; give --onnx too")
    if options.report and not options.output:
        parser.error("--report: is about a packed model; give --output too")
    if options.predict and not options.files:
        parser.error("--predict: name the images to classify")
    if not options.inspect and not options.predict and not options.benchmark:
        if len(options.files) != 1:
            parser.error("give one checkpoint, or --inspect FILE, or --predict FILE IMAGE...")
        if not options.output and not options.onnx and not options.qonnx:
            parser.error("--output, --onnx or --qonnx: say where the model is to be written")
    return options


def add_timing(parser):
    """The flags that say what is timed."""
    parser.add_argument("--benchmark", metavar="FILE", help="time a packed model beside its network without quantizers")
    parser.add_argument("--batch", metavar="N", type=whole_number, nargs="+", help="batch sizes of --benchmark, by default 1")
    parser.add_argument("--threads", metavar="N", type=whole_number, help="CPU threads of --benchmark, by default all cores")
    parser.add_argument("--latency-table", metavar="TABLE.csv",
                        help="write the times of each layer at every pair of bit-widths instead, which search.py --latency "
                             "reads; FILE may then be a checkpoint of stage 1, too")


def whole_number(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected a whole number of at least 1")
    if int(text) > LARGEST_NUMBER:
        raise argparse.ArgumentTypeError(f"found {text}, expected at most {LARGEST_NUMBER}")
    return int(text)


def check_together(parser, options):
    """Refuse flags without the command that they belong to, or beside one that they do not."""
    command = next((flag for flag in COMMANDS if getattr(options, flag)), None)
    for name, value in vars(options).items():
        if name == command or not value or value == parser.get_default(name) or name in COMMANDS.get(command, ()):
            continue
        flag = value[0] if name == "files" else f"--{name.replace('_', '-')}"
        for owner, flags in COMMANDS.items():
            if name in flags and name not in ("files", "arch"):
                parser.error(f"{flag}: belongs to --{owner} FILE")
        if command:
            parser.error(f"--{command} stands alone; leave out {flag}")
    if options.latency_table and len(options.batch or []) > 1:
        parser.error("--batch: a latency table is of one batch size")
    if (options.threads or 0) > (os.cpu_count() or options.threads):
        parser.error(f"--threads: found {options.threads}, this machine has {os.cpu_count()}")


def check_outputs_of(options):
    """Refuse to work for a file that would replace another kind's, or one in use, or that cannot be written in the end."""
    read = [options.benchmark, *options.files, options.config, *(split_arch(options.arch or "") or ())[:1]]
    check_outputs([(f"--{name.replace('_', '-')}", getattr(options, name), kind) for name, kind in WRITTEN.items()], read)


def time_network(options):
    """Time a network, or its layers."""
    from benchmark import benchmark, write_latency_table

    batches = options.batch or [1]
    if options.latency_table:
        write_latency_table(options.benchmark, options.latency_table, batches[0], options.threads, options.arch)
    else:
        benchmark(options.benchmark, batches, options.threads, options.arch)


def export(options):
    """Write a packed model, and ONNX, from a checkpoint; compare their logits with its own; print what they take."""
    import torch

    from packed_network import as_checkpoint, load_any, rebuild, with_configuration

    path = options.files[0]
    check_installed(options)
    content = load_any(path)
    if options.config:
        content = with_configuration(content, path, options.config, options.arch)
        options.arch = options.arch or content["arch"]
    if "packed" in content and options.output:
        raise UserError(f"{path}: is a packed model already; --onnx and --qonnx take one")
    network = rebuild(content, path, options.arch)
    size, seed = content["input_size"], torch.Generator().manual_seed(0)
    images = torch.randn(CHECKED_IMAGES, 3, size, size, generator=seed)
    before = logits_of(network.model, images)
    if options.output:
        data, folds = pack(network, content, path, images if options.fold_bn else None)
        packed = parse_packed(data, options.output)
        again = rebuild(as_checkpoint(packed), options.output, options.arch).model
        comparison = compare(before, network.model, again, images, folds)
        write_atomically(options.output, data)  # only now: a model with other outputs is never a file
        print(f"{describe_sizes(packed)}\n{comparison}")
        if options.report:
            from model_report import make_page

            page = make_page(packed, describe_layers(packed), describe_sizes(packed), path, content)
            write_atomically(options.report, page.encode())
            print(f"report: {options.report}")
    elif options.fold_bn:
        from folding import fold

        fold(network.model, images)
    if options.onnx:
        with naming("--onnx"):
            (write_integer_onnx if options.profile == "integer" else write_onnx)(network.model, options.onnx, images)
    if options.qonnx:
        with naming("--qonnx"):
            write_qonnx(network, options.qonnx, images)


def check_installed(options):
    """Refuse to go on where a package that the options need is missing."""
    if options.onnx or options.qonnx:
        import onnx_export

        onnx_export.check_installed("--qonnx" if options.qonnx else "--onnx")


def write_onnx(model, path, images):
    """Write a network as ONNX, with weights as narrow as onnxruntime takes them, and say what came of it."""
    from onnx_export import checked, logits_of_onnxruntime, narrowest_that_loads, to_onnx

    graph, counts = narrowest_that_loads(to_onnx(model, images.shape[-1]))
    data = checked(graph)
    change = change_of("onnxruntime", logits_of_onnxruntime(data, images), model, images)
    write_atomically(path, data)
    types = ", ".join(f"{count} in {bits}-bit integers" for bits, count in sorted(counts.items()))
    print(f"{path}: {len(data):,} bytes, weights of {types}; logits of {len(images)} random images in onnxruntime: within "
          f"{change:.1e} of PyTorch's")


def write_integer_onnx(model, path, images):
    """Write a network as ONNX that multiplies integers, BatchNorms folded where they can be, and say what came of it."""
    from onnx_export import checked, logits_of_onnxruntime
    from onnx_integer import to_integer_onnx

    graph, counts, error = to_integer_onnx(model, images)
    data = checked(graph)
    try:
        change = change_of("onnxruntime", logits_of_onnxruntime(data, images), model, images, error)
    except UserError as complaint:
        raise UserError(f"{complaint}; --profile qdq may do") from None
    write_atomically(path, data)
    layers = ", ".join(f"{count} in {operator}" for operator, count in counts.items() if count)
    print(f"{path}: {len(data):,} bytes; layers: {layers}; biases rounded to within {error:.4f} of a quantizer's step; "
          f"logits of {len(images)} random images in onnxruntime: within {change:.1e} of PyTorch's")


def write_qonnx(network, path, images):
    """Write a network as QONNX, and say what the package qonnx computes with it and counts in it."""
    from onnx_export import checked
    from qonnx_export import gbitops_of_qonnx, logits_of_qonnx, to_qonnx

    model = to_qonnx(network.model, images.shape[-1])
    data = checked(model)
    change = change_of("the package qonnx", logits_of_qonnx(model, images), network.model, images)
    gbitops = gbitops_of_qonnx(model)
    write_atomically(path, data)
    print(f"{path}: {len(data):,} bytes; logits of {len(images)} random images in qonnx: within {change:.1e} of PyTorch's; "
          f"BitOPs of qonnx {gbitops:.3f} G, of the search by the exact count {network.cost['gbitops_exact']:.3f} G")


def change_of(who, found, model, images, shift=0):
    """By how much logits that something else computed differ from a network's; a UserError where by more than rounding, of
    is_rounding's `shift`."""
    before = logits_of(model, images)
    change = difference(before, found)
    if not is_rounding(change, before, model, images, shift):
        raise UserError(f"{who} gives other outputs than PyTorch (by up to {change:g}); nothing was written")
    return change


def pack(network, content, path, images):
    """(the bytes of a packed model, the BatchNorms that were folded); images to fold with, None where BatchNorms stay."""
    from folding import fold
    from packed_network import header_of, pack_network, recorded_config
    from preprocessing import describe_preprocessing, find_class_names

    folds = {} if images is None else fold(network.model, images)
    layers, tensors, shared = pack_network(network, path)
    data = recorded_config(content, path, network.config.arch).dataloader
    header = header_of(network, content, describe_preprocessing(data, content["input_size"]),
                       find_class_names(data, content["num_classes"]), folds, shared)
    return serialize(header, layers, tensors), folds


def logits_of(model, images):
    """The outputs of a network for images, which it may overwrite, with the same random numbers where it draws any."""
    import torch

    from engine.metrics import evaluation_mode

    with torch.no_grad(), evaluation_mode(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(images.clone())


def compare(before, model, again, images, folds):
    """A line on how the logits of the packed model differ from those of the checkpoint, `before`.

    Without folds they may not; nor may those of `again`, the network in the file, from those of `model`, which was packed.
    """
    folded = f" ({len(folds)} BatchNorms folded)" if folds else ""
    after = logits_of(again, images)
    change = difference(before, after)
    if difference(logits_of(model, images), after) or (change and not is_rounding(change, before, model, images)):
        raise UserError(f"the packed model gives other outputs than the checkpoint (by up to {change:g}), and was not "
                        "written; this should not happen, please report it")
    if change == 0:
        return f"logits of {len(before)} random images: equal to the checkpoint's, bit for bit{folded}"
    return f"logits of {len(before)} random images: within {change:.1e} of the checkpoint's{folded}"


def difference(before, after):
    """The largest difference of two tensors; those that are no finite numbers have to be the same."""
    same = (before == after) | (before.isnan() & after.isnan())
    return (before - after).abs().nan_to_num(float("inf")).where(~same, 0).max().item()


def is_rounding(change, before, model, images, shift=0):
    """Whether rounding explains that logits differ by `change` from those of `model`, `before`.

    An activation beside a threshold may be rounded to the other integer, and change all that comes after it. So logits may
    differ as they do where the input of each layer is off by a little more than rounding, and by up to `shift` of its step.
    """
    import torch

    if change <= SLIGHT * before.nan_to_num(0, 0, 0).abs().max():
        return True
    generator = torch.Generator().manual_seed(0)

    def disturb(module, inputs):
        noise = torch.randn(inputs[0].shape, generator=generator)
        moved = inputs[0] * (1 + DISTURBANCE * noise)
        if shift and hasattr(module.quan_a_fn, "step"):
            moved += shift * module.quan_a_fn.step * (2 * torch.rand(moved.shape, generator=generator) - 1)
        return (moved, *inputs[1:])

    handles = [module.register_forward_pre_hook(disturb) for module in model.modules() if hasattr(module, "quan_w_fn")]
    usual = max(difference(before, logits_of(model, images)) for _ in range(DRAWS))
    for handle in handles:
        handle.remove()
    return change <= MARGIN * usual


def itemise(packed):
    """{part: bytes} of a packed model, parts as PARTS names them."""
    sizes = dict.fromkeys(PARTS, 0)
    for name, tensor in packed.tensors.items():
        sizes[part_of(name, packed)] += tensor.nbytes
    return sizes | {"header": packed.size - sum(sizes.values())}


def part_of(name, packed):
    """Which part of a packed model a tensor belongs to."""
    layer, _, entry = name.removesuffix(".map").rpartition(".")
    if layer in packed.layers and entry == "weight":
        return "packed weights"
    if layer in packed.layers and entry == "bias":
        return "biases"
    if layer.rpartition(".")[2] in ("quan_w_fn", "quan_a_fn") and entry == "s":
        return "step sizes"
    return "BatchNorm" if f"{layer}.running_mean" in packed.tensors else "other tensors"


def describe_sizes(packed):
    """What a packed model takes, part by part, beside what the search promised."""
    sizes, cost = itemise(packed), packed.header["cost"]
    promised, ratio = cost.get("sparse_size_mb", cost["size_mb"]) * 2**20, cost.get("sparse_ratio", cost["ratio"])
    difference = 100 * (sizes["packed weights"] / promised - 1)
    lines = [f"{packed.path}: {packed.header['arch']}, {len(packed.layers)} packed layers", f"{'part':<16} {'bytes':>12}"]
    for part, size in sizes.items():
        note = f"   promised by the search: {promised:,.0f} ({difference:+.3f} %)" if part == "packed weights" else ""
        lines.append(f"{part:<16} {size:>12,}{note}")
    in_floats = 4 * sum(layer.count for layer in packed.layers.values()) + sum(
        sizes[part] for part in ("BatchNorm", "biases", "other tensors"))
    lines += [f"{'the file':<16} {packed.size:>12,}   {packed.size / 2**20:.4f} MB, "
              f"{in_floats / packed.size:.2f}x smaller than the same network with 32-bit weights",
              f"This ratio counts all parts; the weights alone are {ratio:.2f}x smaller, as main.py and the search print"]
    return "\n".join(lines)


def describe_layers(packed):
    """The layers of a packed model as a table, and what it takes."""
    width = max(map(len, packed.layers))
    lines = [f"{'layer':<{width}} {'kind':<7} {'shape':<18} {'weight bits':>11} {'input bits':>11} {'zeros %':>8} "
             f"{'bytes':>11} arithmetic"]
    for name, layer in packed.layers.items():
        entering = "-" if layer.act_bits is None else f"{layer.act_bits} {'us'[layer.act_signed]}"
        stored = f"{layer.bits} {'us'[layer.signed]}"
        lines.append(f"{name:<{width}} {layer.kind:<7} {'x'.join(map(str, layer.shape)):<18} "
                     f"{stored:>11} {entering:>11} {100 * layer.zeros / layer.count:>8.2f} "
                     f"{layer.packed_bytes:>11,}{' with a map' if layer.kept is not None else ''} "
                     f"{f'float: {layer.why_float}' if layer.why_float else 'integer'}")
    parts = ", ".join(f"{part} {size:,}" for part, size in itemise(packed).items() if size)
    header = packed.header
    folded = f"; {len(header['folded'])} BatchNorms folded" if header["folded"] else ""
    return "\n".join([
        f"{packed.path}: {header['arch']}, {header['num_classes']} classes, images of {header['input_size']} pixels{folded}",
        *lines, f"bytes: {parts}; in all {packed.size:,}",
        f"BitOPs {header['cost'].get('gbitops', 0):.3f} G; format {header['version']}"])


def predict(path, files, arch, arithmetic):
    """Print the likeliest classes of image files, as a packed model has them."""
    import torch

    from integer_network import load
    from preprocessing import read_image

    packed = read_packed(path)
    images = torch.stack([read_image(file, packed.header["preprocessing"], packed.header["input_size"]) for file in files])
    model = load(path, arithmetic, arch)
    with torch.no_grad():
        shares, classes = model(images).softmax(1).topk(min(SHOWN_CLASSES, packed.header["num_classes"]))
    names = packed.header["class_names"] or range(packed.header["num_classes"])
    for file, row in zip(files, zip(shares.tolist(), classes.tolist(), strict=True), strict=True):
        print(f"{file}: " + ", ".join(f"{names[index]} ({100 * share:.1f} %)" for share, index in zip(*row, strict=True)))


if __name__ == "__main__":
    with user_errors_on_one_line():
        main()
