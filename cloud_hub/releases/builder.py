"""The build child: checks an uploaded model, quantizes it, measures every variant, and writes a report.

Run as `python -I -m cloud_hub.releases.builder build` in an empty folder; the job comes on standard input, progress
goes to standard output line by line, `report.json` and the variants' files to the folder. It is a process of its own
because it takes hostile files into native libraries: it may crash, hang or swell, and the hub goes on.

Rules: it talks to nobody; it dies with the hub; whatever the libraries raise on an odd graph becomes a refusal of the
model with the library's words, never a traceback that nobody reads. ONNX Runtime comes from cloud_hub/onnx_library.py.

Not here: the deadline and the watch on its memory (workbench.py), whether a figure is good enough (rules.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from cloud_hub import onnx_library
from cloud_hub.releases.job import MAX_JOB_BYTES, MODULE, REPORT_FILE, Held, Hold, Job, Step
from cloud_hub.releases.rules import BuildReport, VariantReport, gate_verdict
from shared import limits
from shared.errors import ModelError, OutriderError
from shared.inference import TensorHead
from shared.model import Preparation, Signature, TensorSpec
from shared.wire.golden import GoldenSet, decode_golden

if TYPE_CHECKING:
    from shared.tensors import Array

BATCH_ROWS: Final = 64
CALIBRATION_ROWS: Final = 1024
TIMED_RUNS: Final = 200
TIMED_NS: Final = 1_000_000_000
HOLD_DEADLINE_S: Final = 60

_GRAPH_TYPES: Final = {
    "tensor(bool)": "bool", "tensor(uint8)": "uint8", "tensor(int8)": "int8", "tensor(uint16)": "uint16",
    "tensor(int16)": "int16", "tensor(uint32)": "uint32", "tensor(int32)": "int32", "tensor(uint64)": "uint64",
    "tensor(int64)": "int64", "tensor(float16)": "fp16", "tensor(float)": "fp32", "tensor(double)": "fp64",
}  # fmt: skip
_PR_SET_PDEATHSIG: Final = 1
_MIN_OPSET: Final = 13
"""Per-channel DequantizeLinear exists from this operator set on."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Graph:
    """A loaded model with what it says of itself."""

    session: Any
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch: int


@dataclass(frozen=True, slots=True)
class Reference:
    """What every variant is measured against: prepared rows, true classes, and what fp32 answered."""

    job: Job
    signature: Signature
    golden: GoldenSet
    rows: dict[str, Array]
    scores: Array


def main(arguments: Sequence[str]) -> int:
    """Entry of the child: `build` or `hold`."""
    data = sys.stdin.buffer.read(MAX_JOB_BYTES)
    if list(arguments) == ["hold"]:
        hold = msgspec.json.decode(data, type=Hold)
        _die_with(hold.parent)
        sys.stdout.write(msgspec.json.encode(_hold(hold)).decode())
        return 0
    job = msgspec.json.decode(data, type=Job)
    _confine(job)
    try:
        report = build(job)
    except OutriderError as error:
        report = BuildReport(code=error.code, reason=error.message, hint=error.hint)
    except MemoryError:
        report = BuildReport(code="model.memory", reason="the build ran out of memory", hint="push a smaller model")
    Path(REPORT_FILE).write_bytes(msgspec.json.encode(report))
    return 0


def build(job: Job) -> BuildReport:
    """Do the job in the current folder; raises OutriderError when the model itself is refused."""
    from cloud_hub.releases import figures

    push = job.push
    _say("checking the file")
    _admit(Path(job.model), what="the model")
    graph = _load(Path(job.model))
    signature = figures.fit_signature(
        push.signature, inputs=graph.inputs, outputs=graph.outputs, preparations=push.preparations
    )
    golden = decode_golden(Path(job.golden).read_bytes(), signature)
    warnings: list[str] = []
    calibration = golden
    if job.calibration:
        calibration = decode_golden(Path(job.calibration).read_bytes(), signature)
    else:
        warnings.append("no calibration set was given: int8 is calibrated and gated on the same golden rows")
    labelled = figures.count_labelled(push, golden)
    _say("measuring fp32")
    rows = _prepared(golden, signature, push.preparations)
    _check_batch(graph, signature, rows)
    scores = _run(graph, signature, rows)
    figures.check_scores(push, scores)
    reference = Reference(job, signature, golden, rows, scores)
    fp32 = _measure(reference, graph, name="fp32", file=Path(job.model))
    _say("quantizing to int8")
    int8 = _int8(reference, graph, calibration)
    passed = [variant for variant in (int8, fp32) if variant.released]
    return BuildReport(
        code="" if passed else "model.gate",
        reason="" if passed else "; ".join(f"{variant.name}: {variant.reason}" for variant in (int8, fp32)),
        hint="" if passed else "train it further, or push with another gate",
        signature=signature,
        samples=golden.samples,
        labelled=labelled,
        variants=(int8, fp32),
        warnings=tuple(warnings),
    )


def _int8(reference: Reference, graph: Graph, calibration: GoldenSet) -> VariantReport:
    job = reference.job
    try:
        rows = _prepared(calibration, reference.signature, job.push.preparations)
        file = _quantize(Path(job.model), rows, batch=graph.batch)
        _admit(file, what="the quantized model")
        _say("measuring int8")
        return _measure(reference, _load(file, batch=graph.batch), name="int8", file=file)
    except OutriderError as error:
        return VariantReport(name="int8", released=False, reason=error.message)


def _admit(file: Path, *, what: str) -> None:
    from shared.model_gate import check_model

    size = file.stat().st_size
    if size > limits.MAX_MODEL_BYTES:
        raise ModelError(f"{what} has {size} bytes, {limits.MAX_MODEL_BYTES} are possible", code="model.too_large")
    check_model(file.read_bytes(), runtime="onnx")


def _load(file: Path, *, batch: int | None = None) -> Graph:
    onnxruntime = onnx_library.onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = _library(
        "cannot be loaded",
        lambda: onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"]),
        file=file,
    )
    inputs = tuple(_spec(node, "input") for node in session.get_inputs())
    outputs = tuple(_spec(node, "output") for node in session.get_outputs())
    leading = {spec.shape[0] if spec.shape else 0 for spec in inputs}
    if leading not in ({-1}, {1}):
        raise ModelError(
            "every input needs the batch as its first axis, of any size or of size 1",
            code="model.signature",
            hint="export the model with a dynamic first axis",
        )
    return Graph(session, inputs, outputs, batch or (BATCH_ROWS if leading == {-1} else 1))


def _spec(node: Any, kind: str) -> TensorSpec:
    dtype = _GRAPH_TYPES.get(node.type)
    if dtype is None:
        raise ModelError(
            f"{kind} {node.name!r} has the type {node.type}, which cannot be sent",
            code="model.signature",
            hint="export plain tensors (for scikit-learn: turn `zipmap` off)",
        )
    shape = tuple(size if isinstance(size, int) and size >= 0 else -1 for size in node.shape)
    return TensorSpec(name=node.name, dtype=dtype, shape=shape)  # type: ignore[arg-type]


def _prepared(golden: GoldenSet, signature: Signature, preparations: Sequence[Preparation]) -> dict[str, Array]:
    """All rows as the graph eats them."""
    from shared.tensors import from_wire, prepare

    by_input = {preparation.input: preparation for preparation in preparations}
    specs = {spec.name: spec for spec in signature.inputs}
    rows: dict[str, Array] = {}
    for tensor in golden.inputs:
        head = TensorHead(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape)
        array = from_wire([head], tensor.data)[tensor.name]
        preparation = by_input.get(tensor.name)
        rows[tensor.name] = array if preparation is None else prepare(preparation, specs[tensor.name], array)
    return rows


def _check_batch(graph: Graph, signature: Signature, rows: dict[str, Array]) -> None:
    """Try one row and then two: a graph may say that its first axis is free and be wrong."""
    _run(graph, signature, {name: array[:1] for name, array in rows.items()})
    if graph.batch > 1:
        try:
            _run(graph, signature, {name: array[:2] for name, array in rows.items()})
        except ModelError as error:
            raise ModelError(
                f"the graph declares a free first axis but fails on two rows: {error.message}",
                code="model.signature",
                hint="export it with a truly dynamic first axis, or with size 1",
            ) from error


def _run(graph: Graph, signature: Signature, rows: dict[str, Array]) -> Array:
    """The first declared output for all rows, one row of results per row of input."""
    import numpy as np

    total = len(next(iter(rows.values())))
    output = [signature.outputs[0].name]
    parts = []
    for start in range(0, total, graph.batch):
        feed = {name: array[start : start + graph.batch] for name, array in rows.items()}
        part = _library("cannot be run", lambda feed=feed: graph.session.run(output, feed)[0])  # type: ignore[misc]
        size = min(graph.batch, total - start)
        if not isinstance(part, np.ndarray) or (part.shape[:1] != (size,) and size != 1):
            raise ModelError(
                f"the first output has the shape {list(np.shape(part))} for {size} rows", code="model.signature"
            )
        parts.append(part.reshape(size, -1))
    if len({part.shape[1] for part in parts}) != 1:
        raise ModelError("the first output has not the same size for every row", code="model.signature")
    return np.concatenate(parts)


def _measure(reference: Reference, graph: Graph, *, name: str, file: Path) -> VariantReport:
    import numpy as np

    from cloud_hub.releases import figures
    from shared.tensors import rows_close

    push = reference.job.push
    scores = reference.scores if name == "fp32" else _run(graph, reference.signature, reference.rows)
    if push.task == "classification":
        answers, fp32_answers = figures.classes_of(scores), figures.classes_of(reference.scores)
        truth = np.asarray(reference.golden.labels)
        known = truth >= 0
        right, fp32_right = (answers == truth)[known], (fp32_answers == truth)[known]
        agreement = float((answers == fp32_answers).mean())
        recorded = tuple(int(answer) for answer in answers)
    else:
        right = rows_close(scores, reference.scores)
        fp32_right = np.ones_like(right)
        agreement, recorded = float(right.mean()), ()
    accuracy = float(right.mean())
    drop_pt = 100.0 * (float(fp32_right.mean()) - accuracy)
    reason = gate_verdict(push.gate, accuracy=accuracy, drop_pt=drop_pt)
    return VariantReport(
        name=name,
        released=not reason,
        reason=reason,
        accuracy=accuracy,
        drop_pt=drop_pt,
        drop_bound_pt=0.0 if name == "fp32" else figures.drop_bound_pt(right, fp32_right),
        agreement=agreement,
        p50_us=_median_us(graph, reference),
        ram_bytes=_ram_bytes(graph, reference, file),
        file=f"{name}.onnx",
        length=file.stat().st_size,
        answers=recorded,
    )


def _median_us(graph: Graph, reference: Reference) -> int:
    """Median time of one row. The interpreter's performance counter is read here because measuring is the purpose."""
    feed = {name: array[:1] for name, array in reference.rows.items()}
    output = [reference.signature.outputs[0].name]
    begin = time.perf_counter_ns()
    times: list[int] = []
    while len(times) < TIMED_RUNS and (not times or time.perf_counter_ns() - begin < TIMED_NS):
        start = time.perf_counter_ns()
        graph.session.run(output, feed)
        times.append(time.perf_counter_ns() - start)
    return round(sorted(times)[len(times) // 2] / 1000)


def _ram_bytes(graph: Graph, reference: Reference, file: Path) -> int:
    """Resident size of a fresh process that holds the model; 0 when it could not be had."""
    types = {node.name: node.type for node in graph.session.get_inputs()}
    shapes = tuple((name, types[name], (1, *array.shape[1:])) for name, array in reference.rows.items())
    hold = Hold(parent=os.getpid(), model=str(file), shapes=shapes)
    with contextlib.suppress(subprocess.TimeoutExpired, msgspec.MsgspecError):
        done = subprocess.run(
            [sys.executable, "-I", "-m", MODULE, "hold"],
            input=msgspec.json.encode(hold),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=HOLD_DEADLINE_S,
            check=False,
        )
        if done.returncode == 0:
            return msgspec.json.decode(done.stdout, type=Held).ram_bytes
    return 0


def _hold(hold: Hold) -> Held:
    import numpy as np

    from shared.tensors import numpy_dtype

    graph = _load(Path(hold.model))
    feed = {
        name: np.zeros(shape, numpy_dtype(_GRAPH_TYPES[kind]))  # type: ignore[arg-type]
        for name, kind, shape in hold.shapes
    }
    graph.session.run(None, feed)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Held(ram_bytes=pages * os.sysconf("SC_PAGE_SIZE"))


def _quantize(model: Path, rows: dict[str, Array], *, batch: int) -> Path:
    """Static int8 in QDQ form, activations u8, weights s8 per channel, ranges by minimum and maximum."""
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    whole, prepared, target = Path("whole.onnx"), Path("prepared.onnx"), Path("int8.onnx")

    def work() -> None:
        graph = onnx.load(str(model), load_external_data=False)
        if any(entry.domain in ("", "ai.onnx") and entry.version < _MIN_OPSET for entry in graph.opset_import):
            graph = onnx.version_converter.convert_version(graph, _MIN_OPSET)
        onnx.save(graph, str(whole))
        quant_pre_process(str(whole), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(target),
            _reader(rows, batch=batch),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            calibrate_method=CalibrationMethod.MinMax,
        )
        _tidy(onnx, target)

    _library("cannot be quantized", work)
    return target


def _reader(rows: dict[str, Array], *, batch: int) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    total = min(len(next(iter(rows.values()))), CALIBRATION_ROWS)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Feeds the calibration rows, batch by batch."""

        def __init__(self) -> None:
            self._batches = self._all()

        def get_next(self) -> dict[str, Array] | None:
            return next(self._batches, None)

        def _all(self) -> Iterator[dict[str, Array]]:
            for start in range(0, total, batch):
                yield {name: array[start : min(start + batch, total)] for name, array in rows.items()}

    return Reader()


def _tidy(onnx: Any, file: Path) -> None:
    """Drop operator sets that the quantizer declares and nothing uses; refuse a result that has nothing quantized."""
    graph = onnx.load(str(file), load_external_data=False)
    if not any(node.op_type == "DequantizeLinear" for node in graph.graph.node):
        raise ModelError("nothing in the graph can be quantized", code="model.quantization")
    used = {node.domain or "" for node in graph.graph.node} | {node.domain or "" for node in graph.functions} | {""}
    kept = [entry for entry in graph.opset_import if (entry.domain if entry.domain != "ai.onnx" else "") in used]
    del graph.opset_import[:]
    graph.opset_import.extend(kept)
    onnx.save(graph, str(file))


def _library(what: str, work: Callable[[], T], *, file: Path | None = None) -> T:
    """Run a library on the model, its complaints turned into ours; `file` is what the library opens."""
    try:
        return work()
    except (OutriderError, MemoryError):
        raise
    # Blanket on purpose: onnx, its quantizer and onnxruntime raise everything from KeyError to classes without a
    # common base on graphs that they do not like, and this process exists to find that out.
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        # Libraries name the file by its path; where the hub keeps it is nobody's business who pushed it.
        told = first.replace(str(file), "the file") if file is not None else first
        raise ModelError(
            f"the model {what}: {type(error).__name__}: {told[:300]}",
            code="model.unusable",
            hint="check that onnxruntime runs the file on your machine, and export it again",
        ) from error


def _say(step: str) -> None:
    sys.stdout.write(msgspec.json.encode(Step(step=step)).decode() + "\n")
    sys.stdout.flush()


def _confine(job: Job) -> None:
    """Give way to everything else, leave no core file, write no endless file, and die with the hub."""
    _die_with(job.parent)
    os.nice(10)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (job.cpu_s, job.cpu_s + 5))
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * limits.MAX_MODEL_BYTES, 4 * limits.MAX_MODEL_BYTES))


def _die_with(parent: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        # The parent was gone before the signal was asked for.
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
