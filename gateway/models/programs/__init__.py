"""Programs of models that run in Triton's Python backend; a build copies each into its model as `1/model.py`.

They may import numpy, onnxruntime, `triton_python_backend_utils` and what lies beside them, nothing of this package.
"""
