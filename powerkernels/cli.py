"""The command line: `powerkernels sample`, `powerkernels bench` and `powerkernels doctor`.

torch and transformers are imported by the command that needs them, so that `--help` answers at
once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from powerkernels import PowerSample, PowerSamplingConfig
    from powerkernels.compare import MethodRun

PROGRAM = "powerkernels"
DEBUG = "POWERKERNELS_DEBUG"  # set: errors keep their traceback
DEFAULT_MAX_NEW_TOKENS = 128  # the paper's 3072 would take hours on a CPU

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPT = 130  # 128 + SIGINT, as a shell reports it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        arguments = _parser().parse_args(argv)
        command: Callable[[argparse.Namespace], int] = arguments.command
        status = command(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        _close_stdout()
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        return EXIT_INTERRUPT
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        expected = isinstance(error, (ValueError, TypeError, OSError, ImportError))
        message = _one_line_message(error)
        if not expected:
            message = f"{type(error).__name__}: {message} (set {DEBUG}=1 for the traceback)"
        print(f"{PROGRAM}: error: {message}", file=sys.stderr)
        return EXIT_USAGE if expected else EXIT_FAILURE


# ---- arguments


class _Parser(argparse.ArgumentParser):
    """Errors in one line, under one name, whichever subcommand finds them."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{PROGRAM}: error: {message} (see: {self.prog} --help)\n")


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        print(f"{PROGRAM} {_version()}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="Samples from p^alpha of a language model, and what runs them here.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_sample(commands)
    _add_bench(commands)
    _add_doctor(commands)
    return parser


def _add_sample(commands: Any) -> None:
    parser = commands.add_parser(
        "sample",
        help="plain, low-temperature and power samples of the same prompts",
        description="Sample each prompt with several methods; show them side by side, "
        "or write JSON lines.",
    )
    parser.set_defaults(command=_sample)

    source = parser.add_argument_group("model and prompts")
    source.add_argument(
        "prompt", nargs="*", metavar="PROMPT", help="prompts; none, or -, reads standard input"
    )
    source.add_argument(
        "--file",
        "-f",
        metavar="F",
        help="prompts from a file, one a line; .jsonl: see --input-format",
    )
    source.add_argument(
        "--input-format",
        choices=("text", "jsonl", "parquet"),
        help="how a file or standard input is read: text, one prompt a line; "
        'jsonl, objects with "prompt" or "messages"; parquet, for a job, with such columns '
        "(default: by the file's name)",
    )
    source.add_argument(
        "--model",
        default="smollm2",
        help="a folder, a hub name, or smollm2, the model that installs with pip (default)",
    )
    source.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="put prompts into the tokenizer's chat template (default: where it has one)",
    )
    source.add_argument(
        "--dtype",
        choices=_DTYPES,
        default="auto",
        help="of the weights (default: the checkpoint's)",
    )
    source.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, … (default: cuda where there is one)"
    )
    source.add_argument(
        "--threads", type=_positive, metavar="N", help="CPU threads (default: torch's choice)"
    )

    settings = parser.add_argument_group("sampling", "the settings of PowerSamplingConfig")
    settings.add_argument(
        "--alpha", type=float, default=4.0, help="power of the target p^alpha (default: 4)"
    )
    settings.add_argument(
        "--max-new-tokens",
        type=int,
        default=DEFAULT_MAX_NEW_TOKENS,
        metavar="N",
        help=f"length limit of a completion (default: {DEFAULT_MAX_NEW_TOKENS})",
    )
    settings.add_argument(
        "--block-size", type=int, metavar="N", help="tokens a block (default: a 16th of the limit)"
    )
    settings.add_argument(
        "--num-mcmc-steps",
        type=int,
        default=10,
        metavar="N",
        help="transitions a block (default: 10)",
    )
    settings.add_argument(
        "--proposal-temperature", type=float, metavar="T", help="of the proposal (default: 1/alpha)"
    )
    settings.add_argument(
        "--seed", type=int, default=0, help="same seed, same samples (default: 0)"
    )
    settings.add_argument(
        "--early-rejection", action=argparse.BooleanOptionalAction, default=True, help="(exact)"
    )
    settings.add_argument(
        "--shared-prefix-skip", action=argparse.BooleanOptionalAction, default=True, help="(exact)"
    )
    settings.add_argument(
        "--prefetch",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="idle lanes make transitions ahead (exact)",
    )
    settings.add_argument(
        "--top-k", type=int, metavar="K", help="restrict the proposal, and the target, to K tokens"
    )
    settings.add_argument(
        "--top-p", type=float, metavar="P", help="to the likeliest with mass P of the proposal"
    )
    settings.add_argument(
        "--min-p", type=float, metavar="P", help="to those with P times the likeliest one's mass"
    )
    settings.add_argument(
        "--compat",
        choices=("reference",),
        help="the law of the public implementation, which is not p^alpha",
    )
    settings.add_argument(
        "--num-lanes", type=int, metavar="N", help="rows of the batch (default: 8 to 16)"
    )
    settings.add_argument(
        "--device-loop",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="the loop on the GPU, in one CUDA graph (default: where possible)",
    )
    settings.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="run the model through torch.compile",
    )
    settings.add_argument(
        "--eos-token-id",
        type=_token_ids,
        metavar="ID[,ID]",
        help="ends a completion; none: nothing does (default: the model's)",
    )
    settings.add_argument(
        "--num-samples", "-n", type=_positive, default=1, metavar="N", help="a prompt (default: 1)"
    )
    settings.add_argument(
        "--methods",
        type=_methods,
        default=None,
        metavar="M[,M]",
        help="of plain, low-temperature, power (default: all three)",
    )

    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", action="store_true", help="JSON lines on standard output in place of the table"
    )
    output.add_argument(
        "--output",
        "-o",
        metavar="FILE",
        help="write JSON lines to a file besides; a job's .jsonl or .parquet file",
    )
    output.add_argument("--quiet", "-q", action="store_true", help="no progress on the terminal")

    job = parser.add_argument_group(
        "jobs",
        "From a file of prompts to a file of samples by many workers; started again, a job goes on "
        "where it was. Under torchrun (RANK and WORLD_SIZE) each process is a worker.",
    )
    job.add_argument("--ray", action="store_true", help="workers are actors of Ray Data")
    job.add_argument(
        "--engine",
        choices=("lanes", "vllm"),
        default="lanes",
        help="what a worker samples with (default: lanes, PowerSampler's own)",
    )
    job.add_argument(
        "--workers",
        type=_positive,
        metavar="N",
        help="actors (default: one a GPU, or one a machine)",
    )
    job.add_argument(
        "--rows-per-part",
        type=_positive,
        metavar="N",
        help="prompts that a worker samples at a time (default: some parts a worker, 128 at most)",
    )


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="time the kernels beside their peers and the limits of this machine",
        description="Time kernels beside their peers and the ceilings of this machine: all, or "
        "those that are named. Or: bench compare A.json B.json (status 1 if ours became slower in "
        "B), bench plot [FILE…], bench report (bench/RESULTS.md from bench/results/), bench list.",
    )
    parser.set_defaults(command=_bench)
    parser.add_argument(
        "what",
        nargs="*",
        metavar="KERNEL",
        help="names of `bench list`, or compare, plot, report, list",
    )
    parser.add_argument("--part", action="append", metavar="P", help="a folder of kernels; repeats")
    parser.add_argument(
        "--peers",
        type=lambda text: [name.strip() for name in text.split(",") if name.strip()],
        metavar="P[,P]",
        help="of `bench list`, or none (default: all that are here)",
    )
    parser.add_argument(
        "--peer-path",
        type=Path,
        metavar="FOLDER",
        help="of the public power sampler, with its power_samp_utils.py",
    )
    parser.add_argument(
        "--size",
        choices=("device", "host", "quick"),
        help="sizes of a GPU's training step, or those that a CPU does (default: by the device)",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that all runs")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="JSON, written after every case (plot: a folder; report: the page)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with --out, without what is in it"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (default: cuda)")
    parser.add_argument(
        "--threads", type=_positive, metavar="N", help="CPU threads (default: torch's choice)"
    )
    parser.add_argument(
        "--min-effect",
        type=float,
        default=0.1,
        metavar="F",
        help="compare: smallest change of the median that counts, a fraction (default: 0.1)",
    )


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="what is on this machine, and what to do about what is missing",
        description="Report what is here and which backend runs where. "
        "Exit status 0 unless something required is broken.",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the text")
    parser.set_defaults(command=_doctor)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {value}")
    return value


def _methods(text: str) -> list[str]:
    from powerkernels.compare import METHODS

    methods = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(METHODS)}, got {text!r}")
    return list(dict.fromkeys(methods))


def _token_ids(text: str) -> tuple[int, ...]:
    if text == "none":
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected token ids separated by commas, or none, got {text!r}"
        ) from None


# ---- powerkernels sample


def _sample(arguments: argparse.Namespace) -> int:
    rank = _rank()
    if arguments.ray or rank is not None:
        return _sample_job(arguments, rank)
    for name in ("workers", "rows_per_part"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')}: is for a job (--ray, or under torchrun)")
    if arguments.engine != "lanes":
        raise ValueError("--engine: is for a job (--ray, or under torchrun)")
    # Everything that can be wrong is looked at before the model is loaded.
    prompts = _read_prompts(arguments)
    if arguments.output is not None:
        _check_writable(Path(arguments.output))
    from powerkernels.compare import METHODS, compare_prompt, compare_runs, run_method
    from powerkernels.models import find_device, load_model
    from powerkernels.prompts import as_chat

    config = _config(arguments)
    device = find_device(arguments.device)
    if arguments.threads is not None:
        import torch

        torch.set_num_threads(arguments.threads)
    model, tokenizer = load_model(arguments.model, arguments.dtype, device, quiet=arguments.quiet)
    encoded = [as_chat(prompt, tokenizer, arguments.chat) for prompt in prompts]

    runs: list[MethodRun] = []
    with contextlib.ExitStack() as stack:
        sinks: list[IO[str]] = [sys.stdout] if arguments.json else []
        if arguments.output is not None:
            sinks.append(stack.enter_context(open(arguments.output, "w", encoding="utf-8")))

        def on_sample(run: MethodRun, sample: PowerSample) -> None:
            record = _record(run, sample, prompts[sample.prompt_index], arguments, model)
            for sink in sinks:
                print(
                    json.dumps(record, ensure_ascii=False, allow_nan=False), file=sink, flush=True
                )

        for method in arguments.methods or METHODS:
            if not arguments.quiet and sys.stderr.isatty():
                print(f"{method}:", file=sys.stderr)
            run = run_method(
                model,
                tokenizer,
                encoded,
                method=method,
                config=config,
                num_samples=arguments.num_samples,
                progress=False if arguments.quiet else None,
                on_sample=on_sample,
            )
            runs.append(run)
            if run.interrupted:
                break

    if not arguments.json:
        width = shutil.get_terminal_size((120, 24)).columns
        for index, prompt in enumerate(prompts):
            if any(sample.prompt_index == index for run in runs for sample in run.samples):
                _write(compare_prompt(prompt, index, runs, width) + "\n\n")
        _write("all prompts\n\n" + compare_runs(runs, width) + "\n")
    return EXIT_INTERRUPT if any(run.interrupted for run in runs) else 0


def _read_prompts(arguments: argparse.Namespace) -> list[Any]:
    """Prompts as given: strings, or lists of chat messages."""
    if arguments.file is not None and arguments.prompt:
        raise ValueError("PROMPT and --file: give one of the two")
    if arguments.file is not None and arguments.file != "-":
        path = Path(arguments.file)
        if arguments.input_format == "parquet" or path.suffix == ".parquet":
            raise ValueError("--file: Parquet is for a job (--ray, or under torchrun)")
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ValueError(f"--file: cannot read {str(path)!r}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"--file: {str(path)!r} is not UTF-8 text: {error.reason}") from error
        is_jsonl = (
            arguments.input_format or ("jsonl" if path.suffix == ".jsonl" else "text")
        ) == "jsonl"
        prompts = _parse_lines(lines, is_jsonl, str(path))
        where = f"--file: {str(path)!r} holds no prompt"
    elif arguments.file == "-" or arguments.prompt in ([], ["-"]):
        if sys.stdin.isatty():
            print("prompts, one a line; Ctrl-D ends:", file=sys.stderr)
        prompts = _parse_lines(
            sys.stdin.read().splitlines(), arguments.input_format == "jsonl", "standard input"
        )
        where = (
            "PROMPT: standard input holds no prompt; "
            "give one as an argument, with --file, or on standard input"
        )
    else:
        prompts = list(arguments.prompt)
        where = "PROMPT: expected at least one prompt"
    if not prompts:
        raise ValueError(where)
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str) and not prompt.strip():
            raise ValueError(f"PROMPT: prompt {index} is empty; expected some text")
    return prompts


def _parse_lines(lines: Iterable[str], is_jsonl: bool, name: str) -> list[Any]:
    from powerkernels.prompts import prompt_of

    if not is_jsonl:
        return [line for line in lines if line.strip()]
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}, line {number}: not JSON: {error.msg}") from error
        prompts.append(prompt_of(record, f"{name}, line {number}"))
    return prompts


def _config(arguments: argparse.Namespace) -> PowerSamplingConfig:
    from powerkernels import PowerSamplingConfig

    names = [field.name for field in dataclasses.fields(PowerSamplingConfig)]
    return PowerSamplingConfig(**{name: getattr(arguments, name) for name in names})


def _sample_job(arguments: argparse.Namespace, rank: tuple[int, int] | None) -> int:
    """Many workers: actors of Ray, or this process as one of torchrun's."""
    if arguments.ray and rank is not None:
        raise ValueError("--ray: not under torchrun, which has set RANK and WORLD_SIZE")
    if arguments.workers is not None and not arguments.ray:
        raise ValueError("--workers: is for --ray; torchrun has --nproc-per-node")
    if arguments.file in (None, "-"):
        raise ValueError("--file: a job (--ray, or under torchrun) needs a file of prompts")
    if arguments.prompt:
        raise ValueError("PROMPT and --file: give one of the two")
    if arguments.output is None or arguments.json:
        raise ValueError("--output: a job needs a file for the samples, and has no --json")
    output = Path(arguments.output)
    _check_writable(output)
    methods = arguments.methods or ["power"]
    if len(methods) != 1:
        raise ValueError(f"--methods: a job has one method, got {','.join(methods)}")

    from powerkernels.compare import method_config
    from powerkernels.integrations.sharding import (
        SamplerFactory,
        SamplingJob,
        plan_job,
        run_rank,
        scan_prompts,
    )

    config = method_config(methods[0], _config(arguments))
    prompts = scan_prompts(Path(arguments.file).absolute(), arguments.input_format)
    # Workers may have another working directory.
    folder = Path(arguments.model).expanduser()
    model = str(folder.absolute()) if folder.is_dir() else arguments.model

    def plan(num_workers: int) -> SamplingJob:
        return plan_job(
            prompts,
            output.absolute(),
            model=model,
            config=config,
            engine=arguments.engine,
            dtype=arguments.dtype,
            method=methods[0],
            num_samples=arguments.num_samples,
            chat=arguments.chat,
            rows_per_part=arguments.rows_per_part,
            num_workers=num_workers,
        )

    def factory(job: SamplingJob, threads: int | None) -> SamplerFactory:
        return SamplerFactory(
            model,
            job.config,
            engine=arguments.engine,
            dtype=arguments.dtype,
            device=arguments.device,
            threads=threads,
        )

    progress = False if arguments.quiet else None
    if rank is not None:
        job = plan(rank[1])
        make = factory(job, arguments.threads)
        shown = progress if rank[0] == 0 else False
        summary = run_rank(job, make, rank=rank[0], world_size=rank[1], progress=shown)
    else:
        from powerkernels.integrations import ray

        plan(arguments.workers or 1).check_output()  # before Ray takes its time to start
        with ray.running(quiet=arguments.quiet):
            workers = arguments.workers or ray.default_workers(arguments.device)
            cpus, gpus = ray.worker_resources(workers, arguments.device, arguments.threads)
            job = plan(workers)
            summary = ray.run_on_ray(
                job,
                factory(job, max(1, int(cpus))),
                num_workers=workers,
                num_cpus=cpus,
                num_gpus=gpus,
                progress=progress,
            )
    if summary is not None and not arguments.quiet:
        errors = f", {summary.num_errors} with an error" if summary.num_errors else ""
        print(f"{output}: {summary.num_rows} prompts{errors}", file=sys.stderr)
    return 0


def _rank() -> tuple[int, int] | None:
    """(rank, world size) where torchrun, or what sets the same variables, started this process."""
    rank, world_size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None or world_size is None:
        return None
    if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
        raise ValueError(
            f"RANK and WORLD_SIZE: expected 0 <= rank < size, got {rank!r} and {world_size!r}"
        )
    return int(rank), int(world_size)


def _record(
    run: MethodRun, sample: PowerSample, prompt: Any, arguments: argparse.Namespace, model: Any
) -> dict[str, Any]:
    """One line of JSON; a number that is not finite becomes null."""
    from powerkernels.records import plain, sample_fields

    settings = dataclasses.asdict(run.config)
    settings |= {
        "model": arguments.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
    }
    settings |= {"num_samples": arguments.num_samples, "powerkernels": _version()}
    trace = sample.trace._asdict() if sample.trace is not None else None
    return {
        "method": run.method,
        "prompt": prompt,
        "prompt_index": sample.prompt_index,
        "sample_index": sample.sample_index,
        **sample_fields(sample),
        "trace": plain(trace),
        "seconds": round(run.seconds, 4),  # since the method began: chains run beside one another
        "settings": plain(settings),
    }


def _check_writable(path: Path) -> None:
    folder = path.parent
    if (
        path.is_dir()
        or not folder.is_dir()
        or not os.access(path if path.exists() else folder, os.W_OK)
    ):
        raise ValueError(
            f"--output: cannot write {str(path)!r}; expected a file in a folder that exists"
        )


# ---- powerkernels bench


def _bench(arguments: argparse.Namespace) -> int:
    root = Path(__file__).resolve().parents[1]
    if not (root / "bench" / "command.py").is_file():
        raise ValueError(
            "bench: the benches are not part of the installed package; run it in a checkout of the "
            "sources, installed with: pip install -e '.[bench]'"
        )
    sys.path.insert(0, str(root))
    try:
        command = importlib.import_module("bench.command")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"bench: {error.name} is not installed; get it with: pip install -e '.[bench]'"
        ) from error
    status: int = command.main(arguments)
    return status


# ---- powerkernels doctor


def _doctor(arguments: argparse.Namespace) -> int:
    from powerkernels import doctor

    checks = doctor.examine()
    if arguments.json:
        report = {"powerkernels": _version(), **doctor.report_json(checks)}
        _write(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    else:
        _write(f"{PROGRAM} {_version()}\n\n{doctor.report_text(checks)}\n")
    return 0 if doctor.is_healthy(checks) else EXIT_FAILURE


# ---- output


def _write(text: str) -> None:
    """Print what the terminal's encoding has, and escape the rest instead of failing."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    sys.stdout.write(text.encode(encoding, errors="backslashreplace").decode(encoding))


def _close_stdout() -> None:
    """Whoever read us is gone: send what is still buffered nowhere, so that exiting stays quiet."""
    with contextlib.suppress(OSError, ValueError, io.UnsupportedOperation):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line_message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    return text or type(error).__name__


def _version() -> str:
    from powerkernels import __version__

    return __version__


if __name__ == "__main__":
    sys.exit(main())
