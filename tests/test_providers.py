"""onnxruntime's GPU providers: which are found, and what the errors say, without a GPU."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.runtime import BACKENDS, NoiseSource, OnnxRuntime, open_predictor


def test_onnxruntime_on_tensorrt_says_what_it_needs(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    with pytest.raises(InputError, match="--backend tensorrt"):
        BACKENDS["onnxruntime-tensorrt"](bundle, "int8", NoiseSource())
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["TensorrtExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda path, options, providers: real(path))
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "")  # put back afterwards
    with pytest.raises(InputError, match=r"used CPUExec.*libnvinfer.so.10.*not the 11 .*tensorrt>=10.16,<11"):
        OnnxRuntime(bundle.variant("fp32"), "TensorrtExecutionProvider")

    def refused(*arguments: object, **named: object) -> None:
        raise RuntimeError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refused)
    with pytest.raises(InputError, match=r"tensorrt>=10.16,<11.*cannot open shared object file"):
        OnnxRuntime(bundle.variant("fp32"), "TensorrtExecutionProvider")


def test_a_provider_that_comes_as_a_plug_in_is_found(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A wheel beside the CPU package: its module is registered, its device chosen, and answers are copied by it."""
    import onnxruntime

    (tmp_path / "onnxruntime_ep_cuda.py").write_text("def get_library_path(): return '/its/library.so'")
    (tmp_path / "onnxruntime_ep_broken.py").write_text("import missing_module")
    monkeypatch.syspath_prepend(tmp_path)
    devices, chosen, real = [], [], onnxruntime.InferenceSession
    (cpu,) = [device for device in onnxruntime.get_ep_devices() if device.ep_name == "CPUExecutionProvider"]

    def register(name: str, library: str) -> None:
        devices.append(SimpleNamespace(ep_name="CudaPluginExecutionProvider", name=name, library=library))

    class Options(onnxruntime.SessionOptions):
        def add_provider_for_devices(self, devices: list[object], options: dict[str, str]) -> None:
            chosen.append((devices, options))

    class Session:
        def __init__(self, network: object, options: object) -> None:
            self.session = real(network)
            self.get_providers = lambda: ["CudaPluginExecutionProvider"]

        def __getattr__(self, name: str) -> object:
            return getattr(self.session, name)

    for name, value in {
        "register_execution_provider_library": register,
        "get_ep_devices": lambda: [cpu, *devices],
        "SessionOptions": Options,
        "InferenceSession": Session,
    }.items():
        monkeypatch.setattr(onnxruntime, name, value)
    inputs, logits = bundle.golden()
    with open_predictor(bundle, "onnxruntime-cuda") as predictor:
        np.testing.assert_allclose(predictor(inputs), logits, atol=1e-4)
    (device,) = devices
    assert (device.name, device.library) == ("onnxruntime_ep_cuda", "/its/library.so")
    assert chosen == [([device], {"use_tf32": "0"})]
    assert "onnxruntime_ep_broken cannot be used and is ignored: No module named 'missing_module'" in caplog.text
