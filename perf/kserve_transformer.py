"""A KServe transformer as a user would write it: JPEG in, labels out, the model asked over gRPC.

Runs in an environment of its own, with kserve and Pillow and nothing of this project; see `pictures`.
"""

# mypy: ignore-errors

import argparse
import io

import kserve
import numpy as np
from kserve import InferInput, InferOutput, InferRequest, InferResponse
from PIL import Image

LABELS = [f"class {n}" for n in range(1000)]


class Transformer(kserve.Model):
    def __init__(self, name, predictor_model):
        super().__init__(name)
        self.predictor_model = predictor_model
        self.ready = True

    async def preprocess(self, payload, headers=None):
        pictures = np.stack([to_tensor(picture) for picture in payload.inputs[0].as_numpy()])
        image = InferInput("x", list(pictures.shape), "FP32")
        image.set_data_from_numpy(pictures, binary_data=True)
        return InferRequest(model_name=self.predictor_model, infer_inputs=[image])

    async def postprocess(self, result, headers=None):
        scores = result.outputs[0].as_numpy()
        best = np.argsort(-scores, axis=1)[:, :5]
        exps = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares = np.take_along_axis(exps / exps.sum(axis=1, keepdims=True), best, axis=1)
        labels = InferOutput("label", list(best.shape), "BYTES")
        labels.set_data_from_numpy(
            np.array([[LABELS[n].encode() for n in row] for row in best], dtype=np.object_), binary_data=True
        )
        score = InferOutput("score", list(best.shape), "FP32")
        score.set_data_from_numpy(shares.astype(np.float32), binary_data=True)
        return InferResponse(response_id="", model_name=self.name, infer_outputs=[labels, score])


def to_tensor(encoded):
    """Short side to 256, the centre of 224 × 224, (pixel − 127) / 128, channels first: as the gateway does."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    scale = 256 / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - 224) // 2, (height - 224) // 2
    pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), dtype=np.float32)
    return ((pixels - 127.0) / 128.0).transpose(2, 0, 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(parents=[kserve.model_server.parser])
    parser.add_argument("--predictor_model")
    arguments, _ = parser.parse_known_args()
    model = Transformer(arguments.model_name, arguments.predictor_model)
    kserve.ModelServer(workers=1).start([model])
