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
import math
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
        choices=("text", "jsonl"),
        help="how a file or standard input is read: text, one prompt a line; "
        'jsonl, objects with "prompt" or "messages" '
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
    output.add_argument("--output", "-o", metavar="FILE", help="write JSON lines to a file besides")
    output.add_argument("--quiet", "-q", action="store_true", help="no progress on the terminal")


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
    # Everything that can be wrong is looked at before the model is loaded.
    prompts = _read_prompts(arguments)
    if arguments.output is not None:
        _check_writable(Path(arguments.output))
    from powerkernels.compare import METHODS, compare_prompt, compare_runs, run_method

    config = _config(arguments)
    device = _device(arguments.device)
    if arguments.threads is not None:
        import torch

        torch.set_num_threads(arguments.threads)
    model, tokenizer = _load(arguments.model, arguments.dtype, device, arguments.quiet)
    encoded = _apply_chat(prompts, tokenizer, arguments.chat)

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
        prompts.append(_prompt_of(record, f"{name}, line {number}"))
    return prompts


def _prompt_of(record: Any, where: str) -> Any:
    if isinstance(record, dict) and isinstance(record.get("prompt"), str):
        return record["prompt"]
    messages = record.get("messages") if isinstance(record, dict) else None
    if isinstance(messages, list) and messages:
        for message in messages:
            keys = ("role", "content")
            if not isinstance(message, dict) or not all(
                isinstance(message.get(key), str) for key in keys
            ):
                raise ValueError(
                    f'{where}: each of "messages" must be {{"role": text, "content": text}}, '
                    f"got {message!r}"
                )
        return messages
    raise ValueError(
        f'{where}: expected an object with "prompt" (text) or "messages" (a list), '
        f"got {str(record)[:80]}"
    )


def _apply_chat(prompts: list[Any], tokenizer: Any, chat: bool | None) -> list[Any]:
    """Strings become one-message chats where a template is wanted; chats stay chats."""
    has_template = getattr(tokenizer, "chat_template", None) is not None
    needs_template = any(not isinstance(prompt, str) for prompt in prompts)
    if not has_template and (chat or needs_template):
        reason = "--chat" if chat else '"messages"'
        raise ValueError(
            f"{reason}: this model's tokenizer has no chat template; "
            "use --no-chat and plain prompts"
        )
    if chat is False and needs_template:
        raise ValueError('--no-chat: the input has "messages", which need the chat template')
    if chat or (chat is None and has_template):
        return [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    return prompts


def _config(arguments: argparse.Namespace) -> PowerSamplingConfig:
    from powerkernels import PowerSamplingConfig

    names = [field.name for field in dataclasses.fields(PowerSamplingConfig)]
    return PowerSamplingConfig(**{name: getattr(arguments, name) for name in names})


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: {name} is not here; see: {PROGRAM} doctor")
    return device


def _load(name: str, dtype_name: str, device: Any, quiet: bool) -> tuple[Any, Any]:
    import torch

    from powerkernels.integrations import smollm2
    from powerkernels.integrations.transformers import load_causal_lm, without_progress_bars

    dtype = None if dtype_name == "auto" else getattr(torch, dtype_name)
    with without_progress_bars():
        if name != "smollm2":
            return load_causal_lm(name, dtype=dtype or "auto", device=device)
        if not quiet and not smollm2.converted_folder().is_dir():
            print("converting SmolLM2, once: about 20 s", file=sys.stderr)
        return smollm2.load_smollm2(dtype, device=device)


def _record(
    run: MethodRun, sample: PowerSample, prompt: Any, arguments: argparse.Namespace, model: Any
) -> dict[str, Any]:
    """One line of JSON; a number that is not finite becomes null."""
    settings = dataclasses.asdict(run.config)
    settings |= {
        "model": arguments.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
    }
    settings |= {"num_samples": arguments.num_samples, "powerkernels": _version()}
    trace = sample.trace._asdict() if sample.trace is not None else None
    record: dict[str, Any] = {
        "method": run.method,
        "prompt": prompt,
        "prompt_index": sample.prompt_index,
        "sample_index": sample.sample_index,
        "text": sample.text,
        "tokens": sample.tokens,
        "log_prob": sample.log_prob,
        "log_likelihood": sample.log_likelihood,
        "confidence": sample.confidence,
        "acceptance_rate": sample.acceptance_rate,
        "decoded_tokens": sample.decoded_tokens,
        "finish_reason": sample.finish_reason,
        "trace": trace,
        "seconds": round(run.seconds, 4),  # since the method began: chains run beside one another
        "settings": settings,
    }
    return {key: _plain(value) for key, value in record.items()}


def _plain(value: Any) -> Any:
    """Tensors to lists, non-finite numbers to None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


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
    import importlib.metadata

    try:
        return importlib.metadata.version(PROGRAM)
    except importlib.metadata.PackageNotFoundError:
        return "unknown (not installed)"


if __name__ == "__main__":
    sys.exit(main())
