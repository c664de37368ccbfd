"""Programs that load an exported file, in Python and C++, for its model card."""

from __future__ import annotations

import json
from keyword import iskeyword
from typing import TYPE_CHECKING

from job.artifacts.export import INPUT_NAME, OUTPUT_NAME

if TYPE_CHECKING:
    from collections.abc import Sequence


def loading_section(
    format: str, name: str, size: tuple[int, ...], outputs: Sequence[str] = (OUTPUT_NAME,)
) -> str:
    """Return Markdown with the programs that load an exported file in inputs of ``size``.

    ``size`` is (3, H, W), or the shape of another input without its batch; ``outputs`` are the
    names of the outputs.
    """
    file = json.dumps(name, ensure_ascii=not name.isprintable())
    if format == "onnx":
        return "\n\n".join((_code("python", _onnx_python(file, size, outputs)),
                            _code("cpp", _onnx_cpp(file, size, outputs))))  # fmt: skip
    if format == "openvino":
        return "\n\n".join((_code("python", _openvino_python(file, size, outputs)),
                            _code("cpp", _openvino_cpp(file, size, outputs))))  # fmt: skip
    if format == "coreml":
        return _code("python", _coreml_python(file, size, outputs))
    if format == "torch-export":
        return _code("python", (
            "import torch\n\n"
            f"network = torch.export.load({file}).module()  # needs no code of the network\n"
            f"{_variable(outputs)} = network(torch.zeros(1, {_sides(size)}))"
            + ("" if len(outputs) == 1 else f"  # a dict of {', '.join(outputs)}")
        ))  # fmt: skip
    loader = (
        f"from safetensors.torch import load_file\n\nstate = load_file({file})"
        if name.lower().endswith(".safetensors")
        else f"import torch\n\nstate = torch.load({file}, weights_only=True)"
    )
    return (
        "The state dict fits the narrow network, which "
        "`gammaslim.load(RUN)` builds from a run or model folder.\n\n" + _code("python", loader)
    )


def _variable(outputs: Sequence[str]) -> str:
    """Return the name of a variable for one output, or for all in one."""
    return _as_name(outputs[0]) if len(outputs) == 1 else "outputs"


def _as_name(output: str) -> str:
    return output if output.isidentifier() and not iskeyword(output) else "output"


def _targets(outputs: Sequence[str]) -> str:
    return f"({_variable(outputs)},)" if len(outputs) == 1 else _variable(outputs)


def _quoted(outputs: Sequence[str]) -> str:
    return ", ".join(map(json.dumps, outputs))


def _item(outputs: Sequence[str]) -> str:
    """Return the subscript of a single output, or a comment that names several."""
    return f"[{_quoted(outputs)}]" if len(outputs) == 1 else f"  # by name: {', '.join(outputs)}"


def _sides(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))


def _onnx_python(file: str, size: tuple[int, ...], outputs: Sequence[str]) -> str:
    return (
        "import numpy as np\nimport onnxruntime\n\n"
        f"session = onnxruntime.InferenceSession({file})\n"
        f"images = np.zeros((1, {_sides(size)}), np.float32)\n"
        f'{_targets(outputs)} = session.run([{_quoted(outputs)}], {{"{INPUT_NAME}": images}})'
    )


def _onnx_cpp(file: str, size: tuple[int, ...], outputs: Sequence[str]) -> str:
    return f"""#include <array>
#include <iostream>
#include <vector>
#include <onnxruntime_cxx_api.h>

int main() {{
  Ort::Env env;
  Ort::Session session(env, ORT_TSTR({file}), Ort::SessionOptions{{}});
  std::vector<float> pixels({" * ".join(map(str, size))});
  std::array<int64_t, {len(size) + 1}> shape{{1, {_sides(size)}}};
  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  auto images = Ort::Value::CreateTensor<float>(
      memory, pixels.data(), pixels.size(), shape.data(), shape.size());
  const char* inputs[] = {{"{INPUT_NAME}"}};
  const char* outputs[] = {{{_quoted(outputs)}}};
  auto result = session.Run(Ort::RunOptions{{}}, inputs, &images, 1, outputs, {len(outputs)});
  const float* {_variable(outputs[:1])} = result[0].GetTensorData<float>();
  std::cout << {_variable(outputs[:1])}[0] << '\\n';
}}"""


def _openvino_python(file: str, size: tuple[int, ...], outputs: Sequence[str]) -> str:
    return (
        "import numpy as np\nimport openvino\n\n"
        f'model = openvino.Core().compile_model({file}, "CPU")\n'
        f"images = np.zeros((1, {_sides(size)}), np.float32)\n"
        f'{_variable(outputs)} = model({{"{INPUT_NAME}": images}}){_item(outputs)}'
    )


def _openvino_cpp(file: str, size: tuple[int, ...], outputs: Sequence[str]) -> str:
    return f"""#include <algorithm>
#include <iostream>
#include <openvino/openvino.hpp>

int main() {{
  ov::Core core;
  auto request = core.compile_model({file}, "CPU").create_infer_request();
  ov::Tensor images(ov::element::f32, {{1, {_sides(size)}}});
  std::fill_n(images.data<float>(), images.get_size(), 0.0f);
  request.set_tensor("{INPUT_NAME}", images);
  request.infer();
  const float* {_variable(outputs[:1])} = request.get_tensor({_quoted(outputs[:1])}).data<float>();
  std::cout << {_variable(outputs[:1])}[0] << '\\n';
}}"""


def _coreml_python(file: str, size: tuple[int, ...], outputs: Sequence[str]) -> str:
    return (
        "import coremltools\nimport numpy as np\n\n"
        f"model = coremltools.models.MLModel({file})\n"
        f"images = np.zeros((1, {_sides(size)}), np.float32)\n"
        f'{_variable(outputs)} = model.predict({{"{INPUT_NAME}": images}})'
        f"{_item(outputs)}  # on macOS"
    )


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"
