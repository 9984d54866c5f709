"""What a method is: one small abstract class for each kind of stage.

A stage is a plain callable that runs in a notebook: it knows neither the store nor Ray. Its settings class
sits beside it, and `@registry.method` gives it the name that configs use.

Shape letters: B batch of candidates, N images, K seeds, C H W latent, h w image (h = w = native size).
Images are float32 RGB in [-1, 1], latents are float32, unless said otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from jaxtyping import Float, Int

from schemas.ids import random_stream
from schemas.records import Combination, Reference, Verdict
from schemas.settings import Settings

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from stages.schedule import Schedule, SchedulerName


@dataclass(frozen=True)
class Resources:
    """What a stage needs, as data. Only the Ray runner reads it."""

    device: Literal["accelerator", "cpu"] = "accelerator"


@dataclass(frozen=True)
class Text:
    """What the text encoders of a backbone say of prompts, a row each. Methods need not look inside."""

    tokens_BLD: Tensor  # the states of the tokens; L = 0 where a backbone reads no text
    pooled_BP: Tensor | None = None  # the state of each prompt as a whole, of backbones that read it too

    def __len__(self) -> int:
        return len(self.tokens_BLD)

    def map(self, change: Callable[[Tensor], Tensor]) -> Text:
        """The text with each of its tensors changed."""
        return Text(change(self.tokens_BLD), None if self.pooled_BP is None else change(self.pooled_BP))

    def expand(self, batch: int) -> Text:
        """One row as `batch` rows, without a copy; `batch` rows as they are."""
        return self.map(lambda tensor: tensor.expand(batch, *tensor.shape[1:]))

    def repeat(self, times: int) -> Text:
        """All rows, and again all rows."""
        return self.map(lambda tensor: tensor.repeat(times, *[1] * (tensor.ndim - 1)))

    @staticmethod
    def cat(texts: Sequence[Text]) -> Text:
        """The rows of one after those of another."""
        import torch

        pooled = [text.pooled_BP for text in texts if text.pooled_BP is not None]
        return Text(torch.cat([text.tokens_BLD for text in texts]), torch.cat(pooled) if pooled else None)


@runtime_checkable
class Backbone(Protocol):
    """A diffusion model behind our interface. Methods call these and never touch a diffusers class."""

    fingerprint: str  # of weights, architecture and dtype
    latent_shape: tuple[int, int, int]  # C, H, W at the native size
    image_size: int  # h = w, pixels
    schedule: Schedule  # noise levels, what the model predicts, and the paths of samplers
    device: Any
    dtype: Any

    def embed(self, prompts: Sequence[str]) -> Text:
        """The prompts as the model reads them; "" is what stands for no words in guidance."""
        ...

    def embed_words(self, prompt: str, words: Mapping[str, Float[Tensor, "B D"]]) -> Text:
        """One prompt in which some words are vectors, a row for each row of the vectors.

        The gradient reaches the vectors and nothing else. Raises `UserError` for a word that is not there.
        """
        ...

    def word(self, text: str | None) -> Float[Tensor, " D"]:
        """The vector of a word of one token; of None, the mean of all. Raises `UserError` for other words."""
        ...

    def predict(self, z_BCHW: Float[Tensor, "B C H W"], t: float, text: Text) -> Float[Tensor, "B C H W"]:
        """The model's output (what `schedule.prediction` says) at time `t` of its training."""
        ...

    def encode(self, image_B3hw: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B C H W"]:
        """Latents of images, scaled to unit variance: of a VAE the posterior mean."""
        ...

    def decode(self, z_BCHW: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 h w"]:
        """Images, not clamped, differentiable."""
        ...


Need = Literal["diffusion", "flow", "prompt", "words"]
"""What a method may need of a backbone: a model of ε or v, a rectified flow, that it reads prompts, that
words can be learned for it."""


@runtime_checkable
class Capabilities(Protocol):
    """What a kind of backbone can do."""

    @property
    def name(self) -> str: ...

    @property
    def schedulers(self) -> tuple[SchedulerName, ...]:
        """The samplers that it can be drawn with."""
        ...

    @property
    def prompted(self) -> bool:
        """Whether it reads prompts; one that does not is drawn with guidance 1."""
        ...

    def refuses(self, needs: frozenset[Need]) -> str | None:
        """What a method with these needs misses, in words; None where it can run."""
        ...


@runtime_checkable
class Facts(Protocol):
    """What is known of a backbone before it is loaded."""

    @property
    def architecture(self) -> Capabilities:
        """What kind of model it is, and what it can do."""
        ...

    @property
    def timesteps(self) -> int:
        """Timesteps of the training schedule."""
        ...

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest prompt, with those that open and close it."""
        ...

    def tokens(self, text: str) -> tuple[str, ...]:
        """The pieces that the text encoder reads, without those that open and close a prompt."""
        ...

    def is_piece(self, text: str) -> bool:
        """Whether the vocabulary has this very piece, as a whole word or as a part of one."""
        ...


@runtime_checkable
class ClipModel(Protocol):
    """An image-text model. Features are not normalised."""

    fingerprint: str
    logit_scale: float

    def encode_image(self, image_B3hw: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B E"]: ...

    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "B E"]: ...


@runtime_checkable
class ImageClassifier(Protocol):
    fingerprint: str
    classes: tuple[str, ...]

    def logits(self, image_B3hw: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B K"]: ...


@runtime_checkable
class Captioner(Protocol):
    fingerprint: str

    def caption(self, image_3hw: Float[Tensor, "3 h w"]) -> str:
        """What the image shows, in a few words; the same words each time."""
        ...


@runtime_checkable
class FeatureExtractor(Protocol):
    """What an image looks like to a network, as numbers. Features are not normalised."""

    fingerprint: str

    def features(self, image_B3hw: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B E"]: ...


@runtime_checkable
class SafetyChecker(Protocol):
    """Says how near an image is to what it was made to keep out."""

    fingerprint: str

    def margin(self, image_B3hw: Float[Tensor, "B 3 h w"]) -> Float[Tensor, " B"]:
        """The most by which an image is nearer to one of the concepts than that concept's threshold."""
        ...


ModelKind = Literal["captioner", "classifier", "clip", "extractor", "safety_checker"]


@runtime_checkable
class Models(Protocol):
    """The models of a worker: each is loaded once, when first asked for."""

    def backbone(self) -> Backbone:
        """The backbone of the build, for measures that use it."""
        ...

    def clip(self, model: str) -> ClipModel: ...

    def classifier(self, model: str) -> ImageClassifier: ...

    def captioner(self, model: str) -> Captioner: ...

    def classes(self, model: str) -> tuple[str, ...]:
        """What `classifier(model).classes` would be, without loading the weights into memory."""
        ...

    def extractor(self, model: str) -> FeatureExtractor: ...

    def feature_size(self, model: str) -> int | None:
        """E of `extractor(model)`, without loading the weights; None: only the model itself knows."""
        ...

    def safety_checker(self, model: str) -> SafetyChecker: ...

    def fingerprint(self, kind: ModelKind, model: str) -> str:
        """What `clip(model).fingerprint` would be, without loading the weights into memory."""
        ...


@dataclass(frozen=True)
class Sampler:
    """How images are drawn: steps, the scale g of classifier-free guidance (1: none), and by what rule."""

    steps: int
    guidance: float
    scheduler: SchedulerName | None = None  # None: ddim, or flow on a flow-matching backbone


@dataclass(frozen=True)
class Inverted:
    """Seeds of a batch of images, with one mapping of measurements an image.

    Every method measures `psnr` (dB, of the image that the sampler draws from the seed), `latent_mse`,
    `calls` (of the model, for one image, guidance counted twice), and what `stages.gaussianity` measures.
    """

    z_BCHW: Float[Tensor, "B C H W"]
    measures: list[dict[str, float]]


@dataclass(frozen=True)
class Chance:
    """The randomness of one candidate: what it draws by itself, and what its stream shares."""

    index: int  # of the candidate in its stream, from 0
    stream: tuple[str | int, ...]  # identity of the stream: build seed, target, recipe

    def own(self) -> np.random.Generator:
        """The candidate's own generator, always from its beginning."""
        return random_stream(*self.stream, self.index)

    def shared(self, *what: str | int) -> np.random.Generator:
        """A generator that every candidate of the stream gets for the same `what`."""
        return random_stream(*self.stream, "shared", *what)


DUMMY = Chance(0, ("dummy",))  # of the rows that fill a batch


@dataclass(frozen=True)
class Material:
    """What an artifact is made from: the references of a class, and randomness of its own."""

    image_N3hw: Float[Tensor, "N 3 h w"]
    target: str  # the class as people read it
    prompt: str
    chance: Chance


@dataclass(frozen=True)
class Order:
    """What a batch of candidates is refined or generated from; every sequence has one entry a row."""

    prompt: str
    z_BCHW: Float[Tensor, "B C H W"]  # seeds: random noise, or combined; to generate from, also refined
    target: str = ""  # the class as people read it
    chances: Sequence[Chance] = ()
    source_B3hw: Float[Tensor, "B 3 h w"] | None = None  # the image that each row starts from, if any
    artifact: Mapping[str, Tensor] = field(default_factory=dict)  # what `prepare` made


@dataclass(frozen=True)
class Generated:
    """Images in [-1, 1], and what is to be known of each."""

    image_B3hw: Float[Tensor, "B 3 h w"]
    prompts: Sequence[str] | None = None  # what each row was asked for, where it is not the order's prompt
    noise_ratios: Sequence[float] | None = None  # r of each row that started from an image
    traces: Sequence[Sequence[float]] | None = None  # the numbers by which the method decided, or its losses


@dataclass(frozen=True)
class Refined:
    z_BCHW: Float[Tensor, "B C H W"]
    losses: list[list[float]]  # of each row, from its first to its last; rows may have different numbers


class Method(ABC):
    """A named method of one kind of stage. `version` is raised when the same settings give other bytes."""

    kind: ClassVar[str]
    name: ClassVar[str]
    Config: ClassVar[type[Settings]]
    version: ClassVar[int] = 1
    resources: ClassVar[Resources] = Resources()
    needs: ClassVar[frozenset[Need]] = frozenset()

    def __init__(self, config: Any):
        self.config = config

    def identity(self) -> dict[str, Any]:
        """What the method is, for fingerprints."""
        return {"settings": self.config.model_dump(mode="json"), "version": self.version}


@dataclass(frozen=True)
class Item:
    """One file that may become a reference. `read` gives its bytes; an I/O error there stops the build."""

    origin: str  # unique within the source and independent of where the source lies: "rose/0001.jpg"
    label: str
    read: Callable[[], bytes]


class Read(Method):
    kind = "read"
    resources = Resources(device="cpu")

    @abstractmethod
    def items(self) -> Iterator[Item]:
        """Every file of the source, in an order that does not depend on the file system.

        Raises `UserError` when the source does not exist or is empty.
        """


class Invert(Method):
    kind = "invert"

    @abstractmethod
    def __call__(self, backbone: Backbone, image_B3hw: Float[Tensor, "B 3 h w"], prompt: str) -> Inverted:
        """The seeds from which the backbone draws the images, with what was measured of each."""


class Combine(Method):
    kind = "combine"
    resources = Resources(device="cpu")

    @abstractmethod
    def seeds_needed(self) -> int:
        """The fewest reference seeds of a class with which the method makes sense."""

    @abstractmethod
    def draw(self, chance: Chance, seeds: int) -> Combination:
        """Which of `seeds` reference seeds a candidate combines, and how. Needs no model."""

    def prepare(
        self,
        invert: Callable[[Float[Tensor, "N 3 h w"]], Float[Tensor, "N C H W"]],
        image_N3hw: Float[Tensor, "N 3 h w"],
        z_NCHW: Float[Tensor, "N C H W"],
    ) -> dict[str, Tensor]:
        """The artifact of a class, made once from its references and their seeds; `invert` inverts more."""
        return {}

    def prepared(self) -> Mapping[str, Any] | None:
        """What the artifact depends on beside references and seeds; None: there is no artifact."""
        return self.identity() if type(self).prepare is not Combine.prepare else None

    @abstractmethod
    def __call__(
        self, z_KCHW: Float[Tensor, "K C H W"], weights: Sequence[float], artifact: Mapping[str, Tensor]
    ) -> Float[Tensor, "C H W"]:
        """One seed from the K parents that `draw` chose, in its order, with its weights."""


class Learning(Method):
    """A method that makes something once from the references of a class: its artifact."""

    def models(self) -> Mapping[str, str]:
        """The models that the method uses beside the backbone, kind → name: {"clip": "tangram"}."""
        return {}

    def prepared(self) -> Mapping[str, Any] | None:
        """What the artifact depends on beside references and models; None: there is no artifact.

        Methods that say the same share one.
        """
        return self.identity() if type(self).prepare is not Learning.prepare else None

    def prepare(self, backbone: Backbone, models: Models, material: Material) -> dict[str, Tensor]:
        """The artifact, shared by all units."""
        return {}


class Refine(Learning):
    kind = "refine"

    def check(self, sampler: Sampler, models: Models, target: str) -> None:
        """Raise `UserError` for what cannot work. Is asked by a plan, so it must load no weights."""

    @abstractmethod
    def __call__(self, backbone: Backbone, models: Models, order: Order, sampler: Sampler) -> Refined:
        """Better seeds for the same order. `sampler` is the one that will draw the images."""


class Generate(Learning):
    kind = "generate"

    starts_from: ClassVar[Literal["seed", "reference", "source"]] = "seed"
    """Whether a row is drawn from its seed alone, or from an image of its own class, or of another one."""

    def sampler(self) -> Sampler:
        """With what images are drawn: by the settings steps, guidance and scheduler, unless overridden."""
        return Sampler(self.config.steps, self.config.guidance, self.config.scheduler)

    def check(self, facts: Facts, models: Models, target: str, prompt: str) -> None:
        """Raise `UserError` for what cannot work. Is asked by a plan, so it must load no weights."""

    @abstractmethod
    def __call__(self, backbone: Backbone, models: Models, order: Order) -> Generated:
        """One image a row."""


@dataclass(frozen=True)
class Question:
    """What a filter is asked about a batch of images: are they pictures of `target`, and not of `others`?

    Classes as people read them ("red star"), and the prompts that stand for them.
    """

    target: str
    prompt: str
    others: Mapping[str, str] = field(default_factory=dict)  # every other class of the build → its prompt
    artifact: Mapping[str, Tensor] = field(default_factory=dict)  # what the filter's `prepare` made


class Measure(Method):
    """Numbers of an image, kept beside it. A measure rejects nothing."""

    kind = "measure"

    uses_backbone: ClassVar[bool] = False
    """Whether the scores depend on the backbone."""

    compares: ClassVar[Literal["references", "held_out"] | None] = None
    """Which other images candidates are compared with: those that the target has, or a held-out set."""

    compared: Sequence[Reference] = ()
    """These images, in the order in which `prepare` saw them. Is set by a plan."""

    def models(self) -> Mapping[str, str]:
        """The scoring models that the method uses, kind → name, for fingerprints."""
        return {}

    @abstractmethod
    def scored(self) -> Mapping[str, Any]:
        """The settings that scores depend on; thresholds are not among them."""

    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Names of the score columns, all float64."""

    def check(self, models: Models, question: Question) -> None:
        """Raise `UserError` when the question cannot be answered (a class that a classifier lacks).

        Is asked when a build is planned, so it must not load weights.
        """

    def prepare(self, models: Models, batches: Iterable[Float[Tensor, "_ 3 h w"]]) -> dict[str, Tensor]:
        """What is kept of the images that candidates are compared with; made once."""
        raise NotImplementedError

    @abstractmethod
    def score(
        self, models: Models, image_B3hw: Float[Tensor, "B 3 h w"], question: Question
    ) -> dict[str, list[float]]:
        """Scores of decoded images, a list of B numbers for each of `columns`.

        The batch is the one in which the images were made; a candidate that failed is a grey image.
        """


class Filter(Measure):
    """A measure that decides."""

    kind = "filter"

    @abstractmethod
    def decide(self, scores: Mapping[str, float]) -> Verdict:
        """The verdict on one image from its scores and the thresholds of the settings. Pure."""


@dataclass(frozen=True)
class Near:
    """Which of some images another is too near to: its place among them, and how near it is."""

    place: int
    score: float
    threshold: float
    reason: str  # "2 bits and cosine 0.9991"


class Pairwise(Filter):
    """A filter that also compares candidates with each other, by a signature that is stored as a score.

    `score` and `prepare` give two columns more: `hash` (64 bits as int64) and `embedding` (E, unit length).
    """

    @abstractmethod
    def nearest(
        self,
        own_hash: int,
        own_E: Float[np.ndarray, " E"],
        hash_N: Int[np.ndarray, " N"],
        embedding_NE: Float[np.ndarray, "N E"],
    ) -> Near | None:
        """The nearest of the images that are too near to one; None when there are none. Pure."""
