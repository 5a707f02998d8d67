"""Ways to run a whole model: eager, compiled, frozen, OpenVINO, and ours."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastcnn.benchmark.case import OURS, Competitor, Entry
from fastcnn.benchmark.suites.common import autocast, layout_of
from fastcnn.training.objective import Objective

EAGER_NCHW, EAGER_NHWC = "eager NCHW", "eager NHWC"
COMPILED, FROZEN = "compile", "compile frozen"
OPENVINO = "OpenVINO"
TORCH = (EAGER_NCHW, EAGER_NHWC, COMPILED, FROZEN)

# OpenVINO's hint for a dtype, and what the compiled model reports.
PRECISIONS = {torch.float32: ("f32", "float32"), torch.bfloat16: ("bf16", "bfloat16")}

MODES = {"cpu": None, "cuda": "max-autotune-no-cudagraphs"}  # of torch.compile; the clock makes the graphs

Factory = Callable[[], nn.Module]


def placed(model: nn.Module, layout: str, device: str) -> nn.Module:
    """A copy of a model in a memory format on a device, in eval mode."""
    return copy.deepcopy(model).eval().to(device, memory_format=layout_of(layout))


def _weights(model: nn.Module, dtype: torch.dtype, device: str) -> nn.Module:
    """On a GPU half precision means half weights, which launch fewer kernels than autocast."""
    return model if device == "cpu" else model.to(dtype)


def _inference(call: Callable[[Tensor], Tensor], dtype: torch.dtype, device: str) -> Entry:
    def run_autocast(x: Tensor) -> Tensor:
        with torch.inference_mode(), autocast(dtype, device):
            return call(x)

    def run_cast(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return call(x.to(dtype))

    return Entry(run_autocast if device == "cpu" else run_cast)


def eager(stock: Factory, dtype: torch.dtype, layout: str, device: str) -> Entry:
    """The stock model as it is."""
    return _inference(_weights(placed(stock(), layout, device), dtype, device), dtype, device)


def compiled(stock: Factory, dtype: torch.dtype, device: str) -> Entry:
    """torch.compile of the NHWC model; on a GPU with max-autotune."""
    model = _weights(placed(stock(), "nhwc", device), dtype, device)
    return _inference(torch.compile(model, mode=MODES[device], dynamic=False), dtype, device)


def frozen(stock: Factory, dtype: torch.dtype, example: Tensor) -> Entry:
    """torch.compile with constants folded (BatchNorm into convolutions, weights packed): on a CPU only."""
    import torch._inductor.config as inductor

    model = torch.compile(placed(stock(), "nhwc", "cpu"), dynamic=False)
    example = example.contiguous(memory_format=torch.channels_last)

    def run(x: Tensor) -> Tensor:
        with torch.no_grad(), autocast(dtype, "cpu"):
            return model(x)

    with inductor.patch(freezing=True):
        run(example)
    return Entry(run)


def openvino(stock: Factory, dtype: torch.dtype, example: Tensor) -> Entry:
    """OpenVINO's CPU plugin in latency mode, with torch's number of threads and the precision forced."""
    import openvino as ov

    hint, reported = PRECISIONS[dtype]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it traces with torch.jit, which newer torch deprecates
        graph = ov.convert_model(placed(stock(), "nchw", "cpu"), example_input=example, input=list(example.shape))
    settings = {
        "INFERENCE_PRECISION_HINT": hint,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled_model = ov.Core().compile_model(graph, "CPU", settings)
    used = str(compiled_model.get_property("INFERENCE_PRECISION_HINT"))
    if reported not in used:
        raise RuntimeError(f"OpenVINO runs in {used} here, not in {hint}")
    request = compiled_model.create_infer_request()

    def run(x: object) -> Tensor:
        request.set_input_tensor(x)
        request.infer()
        return torch.from_numpy(request.get_output_tensor().data)

    return Entry(run)


def _openvino_tensor(inputs: tuple) -> tuple:
    import openvino as ov

    return tuple(ov.Tensor(x.numpy(), shared_memory=True) for x in inputs)


def fastcnn_model(name: str, stock: Factory) -> nn.Module:
    """Our model with the stock model's weights, in eval mode."""
    from fastcnn import models

    model = models.create_model(name)
    model.load_state_dict(stock().state_dict(), strict=True)
    return model.eval()


def optimized(name: str, stock: Factory, dtype: torch.dtype, device: str) -> Entry:
    """fastcnn.optimize of our model; it takes float32."""
    from fastcnn import optimize

    model = optimize(fastcnn_model(name, stock).to(device), dtype=dtype)

    def run(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(x)

    return Entry(run)


def inference_competitors(
    name: str, stock: Factory, dtype: torch.dtype, example: Tensor, device: str, eager_only: bool
) -> tuple[Competitor, ...]:
    """Ours and every peer that the device has; all take float32 images."""

    def competitor(label: str, build: Callable[[], Entry], layout: str = "nhwc", prepare=None) -> Competitor:
        return Competitor(label, dtype, build, layout, torch.float32, prepare)

    found = [
        competitor(OURS, lambda: optimized(name, stock, dtype, device)),
        competitor(EAGER_NHWC, lambda: eager(stock, dtype, "nhwc", device)),
    ]
    if dtype == torch.float32:
        found.append(competitor(EAGER_NCHW, lambda: eager(stock, dtype, "nchw", device), "nchw"))
    if device == "cpu":
        openvino_entry = competitor(OPENVINO, lambda: openvino(stock, dtype, example), "nchw", _openvino_tensor)
        found.append(openvino_entry)
    if not eager_only:
        found.append(competitor(COMPILED, lambda: compiled(stock, dtype, device)))
        if device == "cpu":
            found.append(competitor(FROZEN, lambda: frozen(stock, dtype, example)))
    return tuple(found)


def without_dropout(model: nn.Module) -> nn.Module:
    """The model with every dropout probability at 0: what is random cannot be compared."""
    for module in model.modules():
        if isinstance(getattr(module, "p", None), float):
            module.p = 0.0
    return model


def _gradients(model: nn.Module) -> tuple[Tensor, ...]:
    """The last layer's gradients, which are well conditioned in any precision; all of them as one vector."""
    gradients = [p.grad.detach() for p in model.parameters()]
    return *gradients[-2:], torch.cat([g.double().flatten() for g in gradients])


def training_entry(objective: Objective, dtype: torch.dtype, device: str, call: Callable | None = None) -> Entry:
    """Forward, loss, backward of a batch. Outputs: the loss, the last layer's and all gradients."""
    without_dropout(objective).train()
    call = objective if call is None else call  # `or` would ask a compiled module for its length

    def run(x: Tensor, target: Tensor) -> Tensor:
        objective.zero_grad(set_to_none=True)
        with autocast(dtype, device):
            loss, _ = call(x, target)
        loss.backward()
        return loss.detach()

    return Entry(run, lambda loss: (loss, *_gradients(objective)))


def training_competitors(
    name: str, stock: Factory, dtype: torch.dtype, device: str, eager_only: bool
) -> tuple[Competitor, ...]:
    """Ours and torch's, in training mode with float32 parameters; half precision by autocast."""

    def stock_entry(layout: str, compile_it: bool = False) -> Entry:
        objective = Objective(placed(stock(), layout, device))
        if not compile_it:
            return training_entry(objective, dtype, device)
        without_dropout(objective).train()
        return training_entry(objective, dtype, device, torch.compile(objective, mode=MODES[device], dynamic=False))

    def ours() -> Entry:
        return training_entry(Objective(fastcnn_model(name, stock).to(device)), dtype, device)

    def competitor(label: str, build: Callable[[], Entry], layout: str = "nhwc") -> Competitor:
        return Competitor(label, dtype, build, layout, torch.float32)

    found = [competitor(OURS, ours), competitor(EAGER_NHWC, lambda: stock_entry("nhwc"))]
    if dtype == torch.float32:
        found.append(competitor(EAGER_NCHW, lambda: stock_entry("nchw"), "nchw"))
    if not eager_only:
        found.append(competitor(COMPILED, lambda: stock_entry("nhwc", True)))
    return tuple(found)
