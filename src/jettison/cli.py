"""The command line: thin verbs over the public functions. Everything heavy is imported inside a command."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from jettison.core.errors import BudgetError, InputError, JettisonError
from jettison.sources.limits import LATENCY, MACS, SIZE, make_input, read_limit, read_numbers, read_picture_size

if TYPE_CHECKING:
    from jettison.core.record import Record

F = TypeVar("F", bound=Callable[..., Any])


def reading(read: Callable[..., Any], *rest: Any) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """Turn `read(text, *rest)` into a click callback; an InputError becomes wrong usage that names the option."""

    def callback(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
        try:
            if isinstance(value, tuple):
                return tuple(read(text, *rest) for text in value)
            return None if value is None else read(value, *rest)
        except InputError as error:
            raise click.BadParameter(str(error), ctx, param) from error

    return callback


class Commands(click.Group):
    """A group whose errors end in one message and the exit codes 0, 1 and 2."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> NoReturn:
        """Run, and exit: 0 done; 1 the run failed or was stopped; 2 what was given is wrong."""
        given = list(sys.argv[1:] if args is None else args)
        options["standalone_mode"] = False
        interrupts: list[int] = []
        try:
            with _note_interrupts(interrupts):
                code = super().main(given, *rest, obj=given, **options)
            sys.stdout.flush()
            sys.exit(code if isinstance(code, int) else 0)
        except BrokenPipeError:
            # The reader has gone (`| head`). Python would complain when it flushes stdout at exit.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except (Exception, click.Abort, KeyboardInterrupt) as error:  # noqa: BLE001 - the last place to name an error
            if "--debug" in given:
                traceback.print_exception(error)
            kind, message, code = _explain(KeyboardInterrupt() if interrupts else error)
            if "--json" in given:
                click.echo(json.dumps({"error": kind, "message": message, **_plain_result(error)}))
            else:
                click.echo(f"{kind}: {message}", err=True)
            sys.exit(code)


@contextlib.contextmanager
def _note_interrupts(into: list[int]) -> Iterator[None]:
    """Append each Ctrl-C to `into`: one that comes while a C extension is imported leaves as that one's ImportError."""
    before = signal.getsignal(signal.SIGINT)
    # Another handler is somebody's wish (nohup, a shell's background job), and only the main thread may set one.
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        into.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _explain(error: BaseException) -> tuple[str, str, int]:
    if isinstance(error, click.ClickException):
        return "UsageError", f"{error.format_message()} See `jettison --help`.", 2
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        return "Stopped", "Ctrl-C. With --out, the stages that were finished are kept, and the same command goes on.", 1
    if isinstance(error, JettisonError):
        return type(error).__name__, str(error), 2 if isinstance(error, InputError) else 1
    message = f"{error}".strip() or "no message"
    return type(error).__name__, f"{message}\nThis is an error in jettison; --debug shows where. Please report it.", 1


def _plain_result(error: BaseException) -> dict[str, Any]:
    if not isinstance(error, BudgetError) or error.result is None:
        return {}
    from jettison.core.plain import to_plain

    return {"best": to_plain(error.result.record)}


def common(function: F) -> F:
    """Add the options every command has."""
    function = click.option("--json", "as_json", is_flag=True, help="Write JSON to stdout, and nothing else.")(function)
    return click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")(function)


def pictures(function: F) -> F:
    """Add the options that say how a folder of pictures becomes tensors."""
    for option in (
        click.option("--grey", is_flag=True, help="Read pictures with one channel."),
        click.option("--std", metavar="N,..", callback=reading(read_numbers), help="Then divide by, per channel."),
        click.option("--mean", metavar="N,..", callback=reading(read_numbers), help="Subtract from pixels in 0..1."),
        click.option("--size-px", metavar="N[,N]", callback=reading(read_picture_size), help="Side, or height,width."),
        click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="Items in a batch."),
    ):
        function = option(function)
    return function


def model(function: F) -> F:
    """Add the model and its weights."""
    function = click.option("--device", help="Where to compute: cpu, cuda, cuda:1, mps.")(function)
    weights = click.Path(path_type=Path)
    function = click.option("--weights", type=weights, help="Weights: .safetensors, or a state dict.")(function)
    return click.argument("source", metavar="MODEL")(function)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True)
@click.version_option(package_name="jettison")
def main() -> None:
    """Make a trained network smaller and faster, measured and verified in its runtime.

    MODEL is package.module:callable, timm:NAME, torchvision:NAME or FILE.pt2.
    Inputs (SRC) are a folder of pictures, FILE.npz or package.module:callable.
    """


@main.command()
@model
@click.option("--inputs", "inputs_source", metavar="SRC", required=True, help="Inputs to calibrate and recover with.")
@click.option("--test", metavar="SRC", help="Labelled inputs to prove the accuracy with; used for nothing else.")
@click.option("--limit", type=click.IntRange(1), help="Use at most this many of the inputs.")
@click.option("--target", default="onnxruntime", show_default=True, help="Where the network will run.")
@click.option("--latency", metavar="LIMIT", callback=reading(read_limit, LATENCY), help="0.5 of the original, or 4ms.")
@click.option("--size", metavar="LIMIT", callback=reading(read_limit, SIZE), help="0.5 of the original, or 2MB.")
@click.option("--macs", metavar="LIMIT", callback=reading(read_limit, MACS), help="0.5 of the original, or 30M.")
@click.option("--drop", type=click.FloatRange(0, 100), help="Accuracy that may be lost, in points.")
@click.option("--no-quantize", is_flag=True, help="Keep fp32.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of the runtime.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything that draws.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run; started again, it goes on.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
@pictures
@common
def compress(source: str, inputs_source: str, test: str | None, as_json: bool, out: Path | None, **given: Any) -> None:
    """Compress MODEL under a budget and prove it: file, record and report land in --out."""
    limits: dict[str, float] = dict(given[name] for name in ("latency", "size", "macs") if given[name] is not None)
    if given["drop"] is not None:
        limits["drop"] = given["drop"]
    if not limits:
        raise click.UsageError("No budget was given. Say what must be met, for example --latency 0.5 --drop 1.")
    with _only_json(as_json):
        import jettison
        from jettison.core.budget import Budget
        from jettison.core.recipe import Recipe
        from jettison.sources.models import load_model

        budget = Budget(**limits)
        network = load_model(source, weights=given["weights"], device=given["device"])
        calibration = _load(inputs_source, network, given, limit=given["limit"])
        evaluate = None if test is None else _make_accuracy(_load(test, network, given, limit=None), network, test)
        try:
            result = jettison.compress(
                network,
                calibration,
                budget=budget,
                target=given["target"],
                evaluate=evaluate,
                recipe=Recipe(quantize=False) if given["no_quantize"] else None,
                threads=given["threads"],
                device=given["device"],
                seed=given["seed"],
                out=out,
                quiet=given["quiet"] or as_json,
                name=source,
                command=shlex.join(["jettison", *click.get_current_context().obj]),
            )
        except BudgetError as error:
            if error.result is not None and not as_json:
                _show(error.result.record, error.result.folder, as_json=False)
            raise
    _show(result.record, result.folder, as_json=as_json)


@main.command()
@model
@click.option("--inputs", "inputs_source", metavar="SRC", help="Inputs, of which the first batch is traced.")
@click.option(
    "--shape", "example", multiple=True, callback=reading(make_input), metavar="N,..", help="Or shapes: 1,3,224,224."
)
@click.option("--all", "every", is_flag=True, help="List every group with all its members, and all that is frozen.")
@click.option("--html", "page", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), help="Draw a page.")
@pictures
@common
def trace(
    source: str,
    inputs_source: str | None,
    example: tuple[Any, ...],
    every: bool,
    page: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Show what can be pruned in MODEL and what that is worth, and what cannot and why."""
    if (inputs_source is None) == (not example):
        raise click.UsageError("Give either --inputs SRC or --shape, for example --shape 1,3,224,224.")
    with _only_json(as_json):
        from rich.console import Console

        import jettison
        from jettison.core.plain import to_plain
        from jettison.flow.calibration import count_inputs
        from jettison.graph.draw import draw_explanation
        from jettison.graph.explain import explain
        from jettison.report.graph_page import write_graph
        from jettison.report.terminal import fit_text
        from jettison.sources.inputs import split_batch
        from jettison.sources.models import load_model

        network = load_model(source, weights=given["weights"], device=given["device"])
        device, keywords = given["device"] or "cpu", {}
        if inputs_source is not None:
            item = next(iter(_load(inputs_source, network, given, limit=None)))
            if isinstance(item, Mapping):
                keywords = {name: value.to(device) for name, value in item.items()}
            else:
                example = split_batch(item, count_inputs(network, item))[0]
        graph = jettison.trace(network, tuple(x.to(device) for x in example), kwinputs=keywords)
        found = explain(graph)
        if page is not None:
            write_graph(found, page, source)
    if as_json:
        click.echo(json.dumps(to_plain(found), indent=1))
        return
    click.echo(fit_text(draw_explanation(found, every=every), Console()))
    if page is not None:
        click.echo(f"\nPage: {page}")


@main.command()
@model
@click.option("--inputs", "--calibration", "inputs_source", metavar="SRC", required=True, help="Inputs to round for.")
@click.option("--limit", type=click.IntRange(1), default=512, show_default=True, help="Use at most this many of them.")
@click.option("--judge", "judged", type=click.IntRange(1), default=16, show_default=True, help="Judge on this many.")
@click.option("--target", default="onnxruntime", show_default=True, help="Where the network will run.")
@click.option("--exclude", multiple=True, metavar="LAYER", help="A layer that stays in float; may be given often.")
@click.option("--ranges", default="mse", show_default=True, help="How ranges are chosen.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything that draws.")
@click.option("--all", "every", is_flag=True, help="List every tensor.")
@click.option("--html", "page", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), help="Draw a page.")
@pictures
@common
def diagnose(
    source: str, inputs_source: str, every: bool, page: Path | None, as_json: bool, limit: int, **given: Any
) -> None:
    """Say which tensors of MODEL suffer from int8, how much each costs, why, and what mends it."""
    with _only_json(as_json):
        from rich.console import Console

        import jettison
        from jettison.core.plain import to_plain
        from jettison.report.diagnosis import print_diagnosis, write_diagnosis
        from jettison.sources.models import load_model

        network = load_model(source, weights=given["weights"], device=given["device"])
        found = jettison.diagnose(
            network,
            _load(inputs_source, network, given, limit=limit),
            samples=limit,
            **{name: given[name] for name in ("target", "judged", "exclude", "ranges", "seed")},
        )
        if page is not None:
            write_diagnosis(found, page, source)
    if as_json:
        click.echo(json.dumps(to_plain(found), indent=1))
        return
    print_diagnosis(found, Console(), every=every)
    if page is not None:
        click.echo(f"\nPage: {page}")


@main.command()
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--target", default="onnxruntime", show_default=True, help="The runtime to ask.")
@click.option("--baseline", metavar="FILE", type=click.Path(path_type=Path), help="The float file, timed beside it.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of the runtime.")
@click.option("--precision", default="fp32", show_default=True, help="What a float file runs in: bf16 in OpenVINO.")
@common
def audit(file: Path, as_json: bool, **given: Any) -> None:
    """Show which kernels really run in an exported FILE, and why it is not faster."""
    with _only_json(as_json):
        import jettison
        from jettison.core.plain import to_plain

        found = jettison.audit(file, **given)
    click.echo(json.dumps(to_plain(found), indent=1) if as_json else str(found))


@main.command()
@model
@click.option("--inputs", "--calibration", "inputs_source", metavar="SRC", required=True, help="Typical inputs.")
@click.option("--limit", type=click.IntRange(1), default=512, show_default=True, help="Use at most this many of them.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of the runtimes.")
@click.option("--min-agreement", type=click.FloatRange(0, 1), default=0.95, show_default=True, help="Least agreement.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything that draws.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the exported files.")
@pictures
@common
def targets(source: str, inputs_source: str, as_json: bool, limit: int, **given: Any) -> None:
    """Measure MODEL in every runtime and precision here, and recommend one."""
    with _only_json(as_json):
        import jettison
        from jettison.core.plain import to_plain
        from jettison.sources.models import load_model

        network = load_model(source, weights=given["weights"], device=given["device"])
        data = _load(inputs_source, network, given, limit=limit)
        asked = {name: given[name] for name in ("threads", "min_agreement", "seed", "out")}
        found = jettison.choose_target(network, data, samples=limit, **asked)
    click.echo(json.dumps(to_plain(found), indent=1) if as_json else str(found))


@main.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@common
def report(folder: Path, as_json: bool) -> None:
    """Draw report.html anew from DIR's record.json, and print its table."""
    from jettison.core.plain import read_json
    from jettison.core.record import Record
    from jettison.report.html import write_html

    file = folder / "record.json"
    if not file.is_file():
        raise InputError(f"There is no {file}. A finished run has one. Give the folder that --out named.")
    record = read_json(Record, file)
    write_html(record, folder / "report.html")
    _show(record, folder, as_json=as_json)


@main.command()
@common
def doctor(as_json: bool) -> None:
    """Say which targets are usable on this machine, and what the others miss."""
    from jettison.core.plain import to_plain
    from jettison.sources import doctor as examiner

    diagnosis = examiner.diagnose()
    click.echo(json.dumps(to_plain(diagnosis), indent=1) if as_json else examiner.describe_diagnosis(diagnosis))


@contextlib.contextmanager
def _only_json(as_json: bool) -> Iterator[None]:
    """Send what libraries print to stderr, so that stdout stays JSON."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield


def _load(source: str, network: Any, given: dict[str, Any], *, limit: int | None) -> Any:
    """Load inputs; what a timm network says of its pictures stands in for options that were not given."""
    from jettison.sources.inputs import load_inputs
    from jettison.sources.models import read_preprocessing

    if not Path(source).expanduser().is_dir():
        return load_inputs(source, batch=given["batch"], limit=limit, seed=given.get("seed", 0))
    known = read_preprocessing(network)
    size = given["size_px"] or (known.size if known else None)
    mean = given["mean"] or (known.mean if known else None)
    std = given["std"] or (known.std if known else None)
    options = {"batch": given["batch"], "limit": limit, "seed": given.get("seed", 0), "grey": given["grey"]}
    return load_inputs(source, size=size, mean=mean, std=std, **options)


def _make_accuracy(batches: Any, network: Any, source: str) -> Callable[[Callable[..., Any]], Any]:
    """Return `accuracy(model)`: 1 or 0 for each labelled item, in order, as a float tensor."""
    from jettison.flow.calibration import count_inputs
    from jettison.sources.inputs import split_batch

    first = next(iter(batches))
    positional = count_inputs(network, first)
    if split_batch(first, positional)[1] is None:
        raise InputError(
            f"The inputs {source!r} have no labels, and --test needs them. Give a folder with a sub-folder for each "
            f"class, an .npz with y, or a callable whose batches are (inputs, labels)."
        )

    def accuracy(model: Callable[..., Any]) -> Any:
        import torch

        right = []
        for item in batches:
            inputs, labels = split_batch(item, positional)
            assert labels is not None
            right.append((torch.as_tensor(model(*inputs)).argmax(1).cpu() == labels.cpu()).float())
        return torch.cat(right)

    return accuracy


def _show(record: Record, folder: Path | None, *, as_json: bool) -> None:
    if as_json:
        from jettison.core.plain import to_plain

        click.echo(json.dumps(to_plain(record), indent=1))
        return
    from rich.console import Console

    from jettison.report.terminal import print_table

    print_table(record, Console())
    if folder is not None:
        click.echo(f"Report: {folder / 'report.html'}")


if __name__ == "__main__":
    main()
