"""`garments`: real product photos composed in colour on procedural backgrounds, with everything about them known.

The photos are the embedded subset of Fashion-MNIST. Each is scaled, placed, mirrored, tinted in one of eight
hue families (its shading is kept), sometimes given a patterned fill, and laid over a texture. All of this depends
only on the photo's position in the set, not on the seed of a run, the order of reading, or the version of NumPy.

Whether the object is light on dark or dark on light is drawn per image. So the mean of a pixel does not depend
on the class and a linear probe on raw pixels does badly, while a person sees the garment at once.

N images, S = 32 pixels a side, P = 28 pixels of a photo.
"""

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, ClassVar, Literal

import numpy as np
from scipy import ndimage

from jaxcl.data import hashing, patterns
from jaxcl.data.fashion_mnist import CLASSES, COARSE, COARSE_OF_CLASS, photos
from jaxcl.data.kind import SourceKind
from jaxcl.data.selection import Select
from jaxcl.data.source import ArraySource
from jaxcl.runtime.cores import usable_cores
from jaxcl.runtime.options import SHARE

SIZE = 32
HUES = ("red", "orange", "yellow", "green", "cyan", "blue", "violet", "pink")
HUE_CENTRES = np.array([0.0, 0.075, 0.15, 0.34, 0.5, 0.61, 0.76, 0.9], np.float32)
# The shifted split draws its tints between the familiar hue families.
TINTS = (*HUES, *(f"{a}-{b}" for a, b in zip(HUES, (*HUES[1:], HUES[0]), strict=True)))
BACKGROUNDS = patterns.NAMES
TEXTURE_OF_CLASS = np.arange(10)  # the texture that `spurious` ties to each fine class
CLASS_OF_TEXTURE = np.full(len(patterns.ALL), -1, np.int32)  # its inverse, -1 for textures of no class
CLASS_OF_TEXTURE[TEXTURE_OF_CLASS] = np.arange(10)

# Of the 10,000 training images without spurious ties; a test computes them again.
MEAN = (0.4981, 0.4854, 0.4855)
STD = (0.3027, 0.2892, 0.3051)

_GENERATOR = 20170828  # seed of the set itself; another one makes another set
# Hash streams. Splits that share photos share geometry and tint.
_PLACE, _COLOUR, _BACKGROUND, _FILL, _CHOICE, _SHIFT, _NOISE = range(1, 8)


@dataclasses.dataclass(frozen=True)
class Garments(SourceKind):
    """The composed set: splits "train" (10,000), "test" (2,000), "validation", and two more.

    "test_shifted" is the test photos in the same places on unseen textures and tints, with noise, blur and less
    contrast. "cue_conflict" is the test photos, each filled with the texture that `spurious` ties to another class.

    Options:
      spurious: probability that the texture of a training image is the one of its class; otherwise it is drawn
        freely. Validation images are held out of the training images and tied like them; the test splits are
        always drawn freely.
      spurious_on: "background" or "fill", which texture is tied. "cue_conflict" textures the fill, and with
        "background" the background too, since such a model has learnt to look there.

    Extras: "mask" bool [N,S,S] the object, "coarse", "background" (index into BACKGROUNDS), "fill" (the same;
    "plain" for none), "tint" (index into TINTS); in "cue_conflict" also "shape" and "texture", the two
    classes in conflict. With `spurious`, in every split, "cue" and "coarse_cue": the fine and the coarse class that
    the tied texture indicates, -1 for none, from which `make_source` makes extras["group"].
    """

    extra_splits: ClassVar[tuple[str, ...]] = ("test_shifted", "cue_conflict")
    config_keys: ClassVar[tuple[str, ...]] = ("garments",)

    spurious: Annotated[float, SHARE] = 0.0
    spurious_on: Literal["background", "fill"] = "background"

    def load(self, argument: str, *, split: str, base_split: str, select: Select) -> ArraySource:
        photo_split = "train" if base_split == "train" else "test"
        labels = photos()[f"{photo_split}_labels"]
        rows = select(labels)
        labels = labels[rows]
        # Test photos are numbered after the training photos, so that no two images share their draws.
        ids = rows + (0 if photo_split == "train" else len(photos()["train_labels"]))

        draws = _choose(ids, labels, split, self.spurious, self.spurious_on)
        images = np.empty((len(rows), SIZE, SIZE, 3), np.uint8)
        masks = np.empty((len(rows), SIZE, SIZE), bool)
        shading, cover = _cut_out(photo_split)

        def compose(begin: int) -> None:
            block = slice(begin, begin + 512)  # fits into the processor's cache
            photo = shading[rows[block]], cover[rows[block]]
            drawn = {k: v[block] for k, v in draws.items()}
            images[block], masks[block] = _compose(*photo, ids[block], drawn, split)

        with ThreadPoolExecutor(min(4, usable_cores())) as pool:  # NumPy works outside the interpreter lock
            list(pool.map(compose, range(0, len(rows), 512)))
        extras = {k: draws[k].astype(np.int32) for k in ("background", "fill", "tint")}
        extras |= {"mask": masks, "coarse": COARSE_OF_CLASS[labels]}
        if self.spurious:
            cue = CLASS_OF_TEXTURE[draws[self.spurious_on]]
            extras |= {"cue": cue, "coarse_cue": np.where(cue >= 0, COARSE_OF_CLASS[cue], -1).astype(np.int32)}
        if split == "cue_conflict":
            extras |= {"shape": labels, "texture": draws["texture"].astype(np.int32)}
        return ArraySource(
            images=images,
            labels=labels,
            class_names=CLASSES,
            mean=MEAN,
            std=STD,
            extras=extras,
            coarse_names=COARSE,
            name="garments",
            split=split,
        )


@functools.cache
def _cut_out(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Shading float32 [N,P,P] in [0,1] and object cover bool [N,P,P] of the photos.

    The photos have a black background and dark garments are dark too, so a threshold leaves holes inside an object.
    A hole of a few pixels is cloth; a larger one (under a bag's handle, between a sandal's straps) shows the
    background.
    """
    images = photos()[f"{split}_images"]
    blocks = [_cut_out_block(images[i : i + 512]) for i in range(0, len(images), 512)]  # fit the processor's cache
    shading, cover = (np.concatenate(arrays) for arrays in zip(*blocks, strict=True))
    return shading, cover


def _cut_out_block(photo: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cover = photo > 12
    flat = np.zeros((3, 3, 3), bool)
    flat[1] = ndimage.generate_binary_structure(2, 1)  # neighbours within an image only
    holes = ndimage.binary_fill_holes(cover, flat) & ~cover
    numbered, count = ndimage.label(holes, flat)
    small = np.bincount(numbered.reshape(-1), minlength=count + 1) <= 12
    small[0] = False
    cover = cover | small[numbered]
    # Shading is stretched to the range of each object; a nearly even garment stays even.
    value = photo.astype(np.float32) / 255
    low = np.where(cover, value, 1).min((1, 2), keepdims=True)
    high = np.where(cover, value, 0).max((1, 2), keepdims=True)
    return np.where(cover, (value - low) / np.maximum(high - low, 0.25), 0).astype(np.float32), cover


def _choose(ids, labels, split: str, spurious: float, spurious_on: str) -> dict[str, np.ndarray]:
    """The textures and the tint of each image, int [N] each."""
    u = hashing.uniforms(_GENERATOR, _CHOICE, ids, 8)
    familiar = len(patterns.FAMILIAR)
    free = (u[:, 0] * familiar).astype(np.int64)
    pattern = (u[:, 1] * familiar).astype(np.int64)
    fill = np.where(u[:, 2] < 0.5, patterns.PLAIN, pattern)
    tint = (u[:, 3] * len(HUES)).astype(np.int64)
    draws = {"background": free, "fill": fill, "tint": tint}
    if split in ("train", "validation"):
        tied = u[:, 4] < spurious
        draws[spurious_on] = np.where(tied, TEXTURE_OF_CLASS[labels], draws[spurious_on])
    elif split == "test_shifted":
        draws["background"] = familiar + (u[:, 0] * len(patterns.UNSEEN)).astype(np.int64)
        draws["tint"] = tint + len(HUES)
    elif split == "cue_conflict":
        other = (labels + 1 + (u[:, 5] * (len(CLASSES) - 1)).astype(np.int64)) % len(CLASSES)
        draws["texture"] = other
        draws["fill"] = TEXTURE_OF_CLASS[other]
        draws["background"] = draws["fill"] if spurious_on == "background" else np.full_like(other, patterns.PLAIN)
    return draws


def _compose(photo, cover, ids, draws, split: str) -> tuple[np.ndarray, np.ndarray]:
    """One block of images uint8 [n,S,S,3] and masks bool [n,S,S]."""
    shade, alpha = _place(photo, cover, hashing.uniforms(_GENERATOR, _PLACE, ids, 4))
    u = hashing.uniforms(_GENERATOR, _COLOUR, ids, 16)
    light_object = u[:, 0] < 0.5

    # Background: two colours of any hue on one side of the brightness scale, the object's on the other.
    back = patterns.draw(draws["background"], hashing.uniforms(_GENERATOR, _BACKGROUND, ids, patterns.NUMBERS), SIZE)
    near = np.where(light_object, 0.06 + 0.12 * u[:, 1], 0.94 - 0.12 * u[:, 1])
    far = np.where(light_object, 0.26 + 0.12 * u[:, 2], 0.70 - 0.12 * u[:, 2])
    a = _colour(u[:, 3], 0.15 + 0.65 * u[:, 4], near)
    b = _colour(u[:, 5], 0.15 + 0.65 * u[:, 6], far)
    image = a[:, None, None] + back[..., None] * (b - a)[:, None, None]

    # Object: a ramp from shadow to light in its tint.
    hue = _hue(draws["tint"], u[:, 7])
    saturation = 0.6 + 0.35 * u[:, 8]
    dark = _colour(hue, saturation, np.where(light_object, 0.44, 0.06))
    light = _colour(hue, saturation, np.where(light_object, 0.90, 0.44))
    pattern = patterns.draw(draws["fill"], hashing.uniforms(_GENERATOR, _FILL, ids, patterns.NUMBERS), SIZE)
    # A pattern varies along the same ramp, so that the garment keeps one tint; shading is added to it.
    strength = (0.9 if split == "cue_conflict" else 0.55) * (draws["fill"] != patterns.PLAIN)
    strength = strength.astype(np.float32)[:, None, None]
    level = np.clip(shade * (1 - strength) + strength * pattern, 0, 1)[..., None]
    garment = dark[:, None, None] + level * (light - dark)[:, None, None]

    image += alpha[..., None] * (garment - image)
    if split == "test_shifted":
        image = _shift(image, ids)
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8), alpha > 0.5


def _place(photo, cover, u) -> tuple[np.ndarray, np.ndarray]:
    """Scales by 0.7 to 1, mirrors half, places inside the frame -> shading and alpha, float32 [n,S,S].

    Scaling and shifting are separable, so each axis needs one interpolation matrix: a triangle filter as
    wide as an output pixel (bilinear and antialiased; no photo is enlarged).
    """
    n, size = photo.shape[:2]
    scale = 0.7 + 0.3 * u[:, 0]
    extent = scale * size
    source = np.arange(-2, size + 2, dtype=np.float32)  # two empty pixels on either side
    out = np.arange(SIZE, dtype=np.float32)
    narrow = scale[:, None, None]  # at most 1: the filter is as wide as an output pixel

    def weights(offset, mirror):
        at = (out[None] + 0.5 - offset[:, None]) / scale[:, None] - 0.5  # [n,S] in photo pixels
        at = np.where(mirror[:, None], size - 1 - at, at)
        w = np.maximum(0, 1 - np.abs(at[..., None] - source) * narrow)
        # The weights sum to 1, or the filter would leave a faint grid on the cloth; outside the photo to less.
        return (w / np.maximum(w.sum(-1, keepdims=True), 1))[..., 2:-2]

    rows = weights(u[:, 1] * (SIZE - extent), np.zeros(n, bool))
    columns = weights(u[:, 2] * (SIZE - extent), u[:, 3] < 0.5).transpose(0, 2, 1)
    cover = cover.astype(np.float32)
    alpha = np.clip(rows @ cover @ columns, 0, 1)
    shade = rows @ (photo * cover) @ columns
    return np.where(alpha > 1e-3, shade / np.maximum(alpha, 1e-3), 0), alpha


def _hue(tint: np.ndarray, u: np.ndarray) -> np.ndarray:
    """A hue of the tint's family, float32 [N] on the circle [0, 1)."""
    base = HUE_CENTRES[tint % len(HUES)]
    gap = np.mod(HUE_CENTRES[(tint + 1) % len(HUES)] - base, 1)
    return np.mod(base + np.where(tint < len(HUES), 0, 0.5) * gap + (u - 0.5) * 0.03, 1)


def _colour(hue, saturation, luma) -> np.ndarray:
    """RGB float32 [N,3] of a hue in [0,1), a saturation in [0,1] and (Rec. 601) luma in [0,1]."""
    wheel = np.abs(np.mod(hue[:, None] * 6 + np.array([0, 4, 2], np.float32), 6) - 3) - 1
    rgb = np.clip(wheel, 0, 1) * saturation[:, None] + (1 - saturation[:, None])
    own = (rgb @ np.array([0.299, 0.587, 0.114], np.float32))[:, None]
    target = luma[:, None]
    # Darken by scaling, lighten towards white: both reach the luma exactly and stay inside [0, 1].
    lighter = rgb + (1 - rgb) * np.clip((target - own) / np.maximum(1 - own, 1e-6), 0, 1)
    return np.where(target <= own, rgb * target / own, lighter).astype(np.float32)


def _shift(image: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Less contrast, a blur of up to a pixel, and sensor noise."""
    u = hashing.uniforms(_GENERATOR, _SHIFT, ids, 4)
    contrast = (0.55 + 0.35 * u[:, 0])[:, None, None, None]
    image = 0.5 + (image - 0.5) * contrast + (0.16 * (u[:, 1] - 0.5))[:, None, None, None]
    side = (0.3 * u[:, 2])[:, None, None, None]  # kernel (side, 1 - 2 side, side) along each axis
    for axis in (1, 2):
        edge = np.take(image, [0], axis), np.take(image, [-1], axis)
        padded = np.concatenate([edge[0], image, edge[1]], axis)
        before, after = np.split(padded, [SIZE], axis)[0], np.split(padded, [2], axis)[1]
        image = side * (before + after) + (1 - 2 * side) * image
    v = hashing.uniforms(_GENERATOR, _NOISE, ids, 2 * image[0].size).reshape(2, *image.shape)
    noise = v[0] + v[1] - 1  # triangular, standard deviation 1 / sqrt 6
    return image + (0.05 + 0.15 * u[:, 3])[:, None, None, None] * noise
