"""steps (pure): pre- and post-processing as functions on bytes and arrays; pipelines; the catalogue of steps.

May use values, numpy, Pillow, pydantic. Knows no gRPC, no event loop, no clock and no files: who builds a pipeline
gives it a reader. What a caller's data makes go wrong is `BadInput`, whose text names input, row and reason.
"""

from gateway.steps.build import Finding, PipelineError, build_pipeline
from gateway.steps.catalogue import UnknownStep, find_step
from gateway.steps.declare import FanOutDeclaration, PartDeclaration, PipelineSpec, TensorDeclaration
from gateway.steps.fan_out import FanOut, Items, Split
from gateway.steps.pipeline import ModelCall, Part, Pipeline
from gateway.steps.rows import Batch, Column, Columns, Ragged, batches, column_of, take
from gateway.steps.running import LocalStep, Work
from gateway.steps.step import BadTensor, Params, Read, RowStep, SplitStep, Step, StepError, StepFailed, WrongAnswer
from gateway.v2.raw import raw_view, to_array, to_raw
from gateway.v2.spec import DATATYPES, Array, Datatype, Tensors, TensorSpec, datatype_of, dtype_of

__all__ = [
    "DATATYPES",
    "Array",
    "BadTensor",
    "Batch",
    "Column",
    "Columns",
    "Datatype",
    "FanOut",
    "FanOutDeclaration",
    "Finding",
    "Items",
    "LocalStep",
    "ModelCall",
    "Params",
    "Part",
    "PartDeclaration",
    "Pipeline",
    "PipelineError",
    "PipelineSpec",
    "Ragged",
    "Read",
    "RowStep",
    "Split",
    "SplitStep",
    "Step",
    "StepError",
    "StepFailed",
    "TensorDeclaration",
    "TensorSpec",
    "Tensors",
    "UnknownStep",
    "Work",
    "WrongAnswer",
    "batches",
    "build_pipeline",
    "column_of",
    "datatype_of",
    "dtype_of",
    "find_step",
    "raw_view",
    "take",
    "to_array",
    "to_raw",
]
