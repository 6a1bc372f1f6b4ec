"""How each model of `model_repository/` is built from its pinned source.

An I/O room used by the commands, by nothing on the request path. It may import `artifacts` and the values; numpy and
Pillow are at hand, onnx and onnxruntime (the extra `local`) are imported only where a model is really built.
"""
