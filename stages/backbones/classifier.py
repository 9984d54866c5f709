"""Image classifiers.

- tangram: the embedded one;
- a folder with config.json and model.safetensors, in one of three layouts that config.json tells apart:
  ours (`architecture`, timm's name; `args` of timm.create_model; `classes` in the order of the logits;
  `image_size` in pixels; `mean` and `std` of the pixels on [0, 1]), timm's own (as `save_for_hf` and its hub
  have it, with `label_names`, or ImageNet's where its tag says so), and transformers' for image
  classification (`id2label`, with preprocessor_config.json);
- timm:NAME: pretrained weights of timm by their name, timm:resnet50.a1_in1k; and hf-hub:owner/name (also
  with @revision), any folder as above on the hub;
- package.module:Class: a user's own (`stages.backbones.own`), which must offer `classes`, names in the order
  of the logits, and `logits` of images in [-1, 1], of any size.

The whole image is scored: short side to the input size and the centre square, by bicubic resampling, without
the extra crop of timm's and some of transformers' evaluations. Weights are read as safetensors only.

What a timm network sees before its last layer is of use without the classes: a folder of which only features
are asked for needs no `classes`.

Shape letters: B batch, h w image, K classes, E features.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from schemas.errors import UserError
from schemas.ids import fingerprint
from stages.backbones import files, hub, own
from stages.backbones.pretrained import load_pretrained, map_weights, preprocessing_of
from stages.backbones.resize import Preprocessing

FILES = ("config.json", "model.safetensors")
PROCESSOR = "preprocessor_config.json"
TIMM = "timm:"
ALLOWED = (
    f"give tangram, a folder with {' and '.join(FILES)}, {TIMM}NAME such as {TIMM}resnet50.a1_in1k,"
    f" {hub.PREFIX}owner/name, or package.module:Class"
)


class TimmNetwork:
    """Looks at image tensors as they are: in [-1, 1], of any size, with gradient."""

    def __init__(self, model: Any, prepare: Preprocessing, fingerprint: str):
        self._model, self._prepare = model, prepare
        self.fingerprint = fingerprint

    def features(self, image_B3hw: Float[Tensor, "B 3 h w"]) -> Tensor:
        """What the last layer is given: (B, E), unless the settings of the network say otherwise."""
        return self._model.forward_head(
            self._model.forward_features(self._prepare(image_B3hw)), pre_logits=True
        )


class Classifier:
    """Looks at image tensors as they are: in [-1, 1], of any size, with gradient."""

    def __init__(self, fingerprint: str, classes: Sequence[str], see: Callable[[Tensor], Tensor]):
        self.fingerprint, self.classes = fingerprint, tuple(classes)
        self._see = see

    def logits(self, image_B3hw: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B K"]:
        return self._see(image_B3hw)


@dataclass(frozen=True)
class _Place:
    """A folder whose files are all there, and what its config.json says."""

    folder: Path
    config: Mapping[str, Any]
    layout: Literal["ours", "timm", "transformers"]
    what: str

    @property
    def files(self) -> tuple[str, ...]:
        return (*FILES, PROCESSOR) if self.layout == "transformers" else FILES


def load_classifier(model: str, device: torch.device) -> Classifier:
    what = f"classifier {model}"
    if _is_own(model):
        made = own.on_device(_own(model), device)
        identity, classes = _own_facts(model)

        def see(image_B3hw: Tensor) -> Tensor:
            found = made.logits(image_B3hw.to(device))
            return own.rows(found, len(image_B3hw), what, "logits", "images", len(classes))

        return Classifier(identity, classes, see)
    place, classes = _place(model, what), classifier_classes(model)
    with _told(place):
        load = _transformers_network if place.layout == "transformers" else _timm_network
        network, prepare, outputs = load(place, device)
    if len(classes) != outputs:
        raise UserError(
            f"{what}: {place.folder / FILES[0]} names {len(classes)} classes, the network has {outputs}"
        )
    logits = (lambda found: found.logits) if place.layout == "transformers" else (lambda found: found)
    return Classifier(_fingerprint(place), classes, lambda image: logits(network(prepare(image))))


def load_network(model: str, device: torch.device) -> TimmNetwork:
    """The timm network of a classifier, for its features."""
    place = _timm_place(model)
    with _told(place):
        network, prepare, _ = _timm_network(place, device)
    return TimmNetwork(network, prepare, _fingerprint(place))


def feature_size(model: str) -> int:
    """How many features `load_network(model, …)` gives, without its weights."""
    place = _timm_place(model)
    with _told(place), torch.device("meta"):
        return int(_empty_network(place).head_hidden_size)


def _timm_network(place: _Place, device: torch.device) -> tuple[Any, Preprocessing, int]:
    """The network, how it wants images, and how many logits it gives."""
    import timm

    weights = place.folder / FILES[1]
    with torch.inference_mode(False):
        if place.layout == "ours":
            network = _empty_network(place)
            network.load_state_dict(load_file(weights))
            config = place.config
            prepare = Preprocessing(config["image_size"], config["mean"], config["std"], device)
        else:  # timm's own loader knows the forms in which weights of its architectures were published
            network = timm.create_model(f"local-dir:{place.folder}", pretrained=True)
            given = network.pretrained_cfg
            prepare = Preprocessing(given["input_size"][-1], given["mean"], given["std"], device)
        if device.type == "cpu":
            map_weights(network, weights)
    return network.to(device).eval().requires_grad_(False), prepare, network.num_classes


def _empty_network(place: _Place) -> Any:
    """The network before its weights are loaded."""
    import timm

    if place.layout == "timm":
        return timm.create_model(f"local-dir:{place.folder}", pretrained=False)
    return timm.create_model(place.config["architecture"], pretrained=False, **place.config["args"])


def _transformers_network(place: _Place, device: torch.device) -> tuple[Any, Preprocessing, int]:
    import transformers

    given = {"trust_remote_code": False}
    auto = transformers.AutoModelForImageClassification
    network = load_pretrained(auto, place.folder, place.what, **given)
    processor = transformers.AutoImageProcessor.from_pretrained(place.folder, local_files_only=True, **given)
    prepare = preprocessing_of(processor, place.what, device)
    return network.to(device).eval().requires_grad_(False), prepare, network.config.num_labels


@contextmanager
def _told(place: _Place) -> Iterator[None]:
    """What is wrong with a folder, as one line."""
    with files.told(place.what):
        try:
            yield
        except KeyError as error:
            raise UserError(f"{place.what}: {place.folder / FILES[0]} lacks {error}") from error


def classifier_classes(model: str) -> tuple[str, ...]:
    """`load_classifier(model, …).classes`, from the config file alone."""
    if _is_own(model):
        return _own_facts(model)[1]
    place = _place(model, f"classifier {model}")
    try:
        names = _names(place)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{place.what}: {place.folder / FILES[0]} has no list of classes; add them as"
            f" {_NAMES_KEY[place.layout]}"
        ) from error
    return tuple(str(name) for name in names)


_NAMES_KEY = {"ours": "`classes`", "timm": "`label_names`", "transformers": "`id2label`"}


def _names(place: _Place) -> Sequence[str]:
    """The classes in the order of the logits. Raises what a wrong config raises."""
    config = place.config
    if place.layout == "ours":
        return tuple(config["classes"])
    if place.layout == "transformers":
        return [config["id2label"][str(index)] for index in range(len(config["id2label"]))]
    inner = config.get("pretrained_cfg", config)  # older files have no inner one
    said = {**inner, **config}
    names, described = said.get("label_names") or said.get("labels"), said.get("label_descriptions") or {}
    if names is None:
        return _imagenet(inner.get("tag") or "", said["num_classes"])
    if isinstance(names, Mapping):
        names = [names[str(index)] for index in range(len(names))]
    return [f"{described[name]}, {name}" if name in described else name for name in names]


def _imagenet(tag: str, count: int) -> list[str]:
    """ImageNet's words and the synset of each class, if the weights' tag says so and the number fits."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None or not re.search(r"in(1|12|21|22)k", tag):
        raise ValueError("neither names nor ImageNet")
    info = ImageNetInfo(subset)
    return [f"{info.label_name_to_description(synset)}, {synset}" for synset in info.label_names()]


def class_index(target: str, classes: Sequence[str], model: str) -> int:
    """Where a class stands among the model's.

    Names are compared without case, "_" and "-" as spaces. Of a class of several names with commas between,
    as ImageNet's are ("tench, Tinca tinca, n01440764"), each will do if no other class has it.
    """
    found = _find(_fold(target), tuple(classes))
    if len(found) == 1:
        return found[0]
    if found:
        several = "; ".join(classes[index] for index in found[:4])
        raise UserError(
            f"the classifier {model} has several classes of the name {target!r}: {several}; name the class"
            " so that only one of them fits"
        )
    known = list(classes)
    if len(known) > 30:
        near = difflib.get_close_matches(_fold(target), known, n=5, cutoff=0.3)
        known = [f"{len(classes)} others, such as {'; '.join(near or known[:5])}"]
    raise UserError(f"the classifier {model} does not know the class {target!r}; it knows {', '.join(known)}")


@lru_cache(maxsize=1024)
def _find(wanted: str, classes: tuple[str, ...]) -> list[int]:
    whole = [index for index, name in enumerate(classes) if _fold(name) == wanted]
    return whole or [i for i, name in enumerate(classes) if wanted in map(_fold, name.split(","))]


def _fold(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def classifier_fingerprint(model: str, what: str | None = None) -> str:
    """`load_classifier(model, …).fingerprint`, from the bytes of the files alone, or what a user's own says.

    Errors are about `what`.
    """
    if _is_own(model):
        return _own_facts(model)[0]
    return _fingerprint(_place(model, what or f"classifier {model}"))


def _fingerprint(place: _Place) -> str:
    return fingerprint({"files": files.hashes(place.folder, [place.folder / n for n in place.files])})


def _is_own(model: str) -> bool:
    return not model.startswith((TIMM, hub.PREFIX)) and own.is_import_path(model)


def _own(path: str) -> Any:
    what = f"classifier {path!r}"
    made = own.make(path, what, ALLOWED)
    own.need(made, ("logits",), ("classes",), what)
    return made


@cache
def _own_facts(path: str) -> tuple[str, tuple[str, ...]]:
    """Identity and classes. A model must be made to be asked, so it is asked once."""
    what, made = f"classifier {path!r}", _own(path)
    classes = made.classes
    if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{what}: its classes are {classes!r:.80}; they must be a sequence of names")
    return own.identity(path, made, what), tuple(classes)


def _timm_place(model: str) -> _Place:
    place = _place(model, f"extractor {model}")
    if place.layout == "transformers":
        raise UserError(
            f"{place.what}: {place.folder} holds a transformers model; features are taken of timm networks,"
            " of CLIP models, and of a user's own module"
        )
    return place


def _place(model: str, what: str) -> _Place:
    """Where the files lie on this machine, downloaded if need be."""
    hub_id = None
    if model == "tangram":
        folder = files.tangram() / "classifier"
    elif model.startswith((TIMM, hub.PREFIX)):
        hub_id = _timm_repository(model) if model.startswith(TIMM) else model.removeprefix(hub.PREFIX)
        folder = hub.fetch(hub_id, (FILES[0], PROCESSOR), what)
    else:
        folder = Path(model).expanduser().resolve()
        if not folder.is_dir():
            raise UserError(f"unknown classifier {model!r}; {ALLOWED}")
    files.need(folder, FILES[:1], what)
    config, layout = _read(folder / FILES[0], what)
    if hub_id is not None:
        hub.fetch_weights(hub_id, folder, FILES[1], what)
    place = _Place(folder, config, layout, what)
    files.need(folder, place.files, what)
    return place


def _read(path: Path, what: str) -> tuple[dict[str, Any], Literal["ours", "timm", "transformers"]]:
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{what}: {path} is no JSON: {files.first_line(error)}") from error
    if "architecture" in config:
        return config, "ours" if "args" in config else "timm"
    if "model_type" in config:
        return config, "transformers"
    raise UserError(
        f"{what}: {path} lacks 'architecture', by which timm knows a network, and 'model_type', by which"
        " transformers does; is it the right folder?"
    )


def _timm_repository(model: str) -> str:
    import timm

    name = model.removeprefix(TIMM)
    try:
        listed = timm.get_pretrained_cfg(name)
    except RuntimeError:  # an unknown tag
        listed = None
    if listed is None or not listed.hf_hub_id:
        like = timm.list_pretrained(f"{name.partition('.')[0]}*")[:5]
        known = f"it has {', '.join(like)}" if like else "timm.list_pretrained() lists what it has"
        raise UserError(f"timm has no weights {name!r} on the hub; {known}")
    return listed.hf_hub_id
