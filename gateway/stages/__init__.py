"""stages (pure): pre- and post-processing as functions on bytes and arrays; pipelines; the catalogue of steps.

May use values, numpy, Pillow, pydantic. Knows no gRPC, no event loop, no clock and no files: who builds a pipeline
gives it a reader. What a caller's data makes go wrong is `BadInput`, whose text names input, row and reason.
"""

from gateway.stages.build import Finding, PipelineError, build_pipeline
from gateway.stages.catalogue import UnknownStep, find_step
from gateway.stages.declare import PartDeclaration, PipelineSpec, TensorDeclaration
from gateway.stages.pipeline import LocalStep, ModelCall, Part, Pipeline, Work
from gateway.stages.raw import Buffer, raw_view, to_array, to_raw
from gateway.stages.spec import DATATYPES, Array, Datatype, Tensors, TensorSpec, datatype_of, dtype_of
from gateway.stages.step import BadTensor, Params, Read, RowStep, Step, StepError, StepFailed, WrongAnswer

__all__ = [
    "DATATYPES",
    "Array",
    "BadTensor",
    "Buffer",
    "Datatype",
    "Finding",
    "LocalStep",
    "ModelCall",
    "Params",
    "Part",
    "PartDeclaration",
    "Pipeline",
    "PipelineError",
    "PipelineSpec",
    "Read",
    "RowStep",
    "Step",
    "StepError",
    "StepFailed",
    "TensorDeclaration",
    "TensorSpec",
    "Tensors",
    "UnknownStep",
    "Work",
    "WrongAnswer",
    "build_pipeline",
    "datatype_of",
    "dtype_of",
    "find_step",
    "raw_view",
    "to_array",
    "to_raw",
]
