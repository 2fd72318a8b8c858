"""The corruptions of ImageNet-C, by name and severity: all fifteen except frost, which needs photographs.

Severities come from the published set with the nearest image size: CIFAR-10-C (32 pixels), Tiny ImageNet-C (64) or
ImageNet-C (224). The corruption of an image depends on its index, the name and the severity only. The images differ
from the published files: random numbers are different, and motion blur is ImageMagick's formula in floats.

B images, S side, C channels, W taps, Z zooms, M side of a map (a power of two).

Source: Hendrycks and Dietterich 2019, arXiv 1903.12261, and their released code.
"""

import functools
import io
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from PIL import Image
from scipy import ndimage, special

from jaxcl.errors import UserError
from jaxcl.evaluate.severities import CONSTANTS, SIDES
from jaxcl.runtime.options import quoted, suggestion

Array = jax.Array
GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
NAMES = tuple(name for names in GROUPS.values() for name in names)
COMPUTED = tuple(name for name in NAMES if name != "frost")
SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(images: np.ndarray, name: str, severity: int, index: np.ndarray) -> np.ndarray:
    """Applies one of the corruptions of ImageNet-C.

    Args:
      images: uint8 [B,S,S,3].
      name: one of COMPUTED.
      severity: 1 to 5.
      index: int [B], the number of each image in its set; random numbers follow from it.

    Returns:
      uint8 [B,S,S,3], rounded down as in the published files.

    Raises:
      UserError: another name, severity, dtype or shape.

    References:
      Hendrycks and Dietterich 2019, arXiv 1903.12261, appendix B, and their released code.
    """
    check_name("corrupt: name is", name)
    check_severity("corrupt: severity is", severity)
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3:
        raise UserError(f"corrupt takes uint8 images [B,S,S,3], got {images.dtype} {list(images.shape)}")
    side, kind = images.shape[1], _KINDS[name]
    table = int(np.abs(np.log(np.array(SIDES) / side)).argmin())
    constants = CONSTANTS[name][table][severity - 1]
    constants = constants if isinstance(constants, tuple) else (constants,)
    if kind.on_host:
        return np.stack([np.asarray(kind.apply(Image.fromarray(image), *constants)) for image in images])
    values = kind.prepare(side, table, *constants) if kind.prepare else constants
    values = jax.tree.map(lambda v: np.asarray(v, np.float32), values)
    return np.asarray(_corrupt(name, images, np.uint32(severity), np.asarray(index, np.int32), values))


def check_name(where: str, name: str, known: tuple[str, ...] = COMPUTED) -> None:
    """Raises UserError for a corruption that does not exist. where: the start of the message."""
    if name not in known:
        reason = ", which is not computed here: it needs photographs" if name in NAMES else ""
        raise UserError(f"{where} {quoted(name)}{reason}{suggestion(name, known)}")


def check_severity(where: str, severity: int) -> None:
    """Raises UserError for a severity that does not exist; `where` as in `check_name`."""
    if severity not in SEVERITIES:
        raise UserError(f"{where} {quoted(severity)}; expected whole numbers from 1 to 5")


@functools.partial(jax.jit, static_argnames="name")
def _corrupt(name: str, images: Array, severity: Array, index_B: Array, values: Any) -> Array:
    key = jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), NAMES.index(name))
    keys_B = jax.vmap(functools.partial(jax.random.fold_in, jax.random.fold_in(key, severity)))(index_B)
    pixels = images.astype(jnp.float32) / 255
    return _bytes(_KINDS[name].apply(keys_B, pixels, *values)).astype(jnp.uint8)


def _bytes(pixels: Array) -> Array:
    """[0, 1] -> whole numbers from 0 to 255, rounded down; the small offset makes up for rounding errors of floats."""
    return jnp.floor(jnp.clip(pixels, 0, 1) * 255 + 1e-3)


def _draws(draw: Callable, keys_B: Array, shape: tuple[int, ...], **options: Any) -> Array:
    """One draw for each key, [B, *shape]."""
    return jax.vmap(lambda key: draw(key, shape, jnp.float32, **options))(keys_B)


def _split(keys_B: Array, count: int) -> Array:
    return jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys_B)


def _separable(matrix_SxS: Array, x: Array) -> Array:
    """Multiplies rows and columns of x [B,S,S,C] by the matrix."""
    exact = lax.Precision.HIGHEST  # a bfloat16 product would add a corruption
    return jnp.einsum("yh,xw,bhwc->byxc", matrix_SxS, matrix_SxS, x, precision=exact)


# ---- noise


def _gaussian_noise(keys_B, x, scale):
    return x + scale * _draws(jax.random.normal, keys_B, x.shape[1:])


def _photons(side: int, table: int, photons: float) -> tuple:
    """Cumulative distributions of the counts at the 256 levels, [256,K]: much faster than drawing by rejection."""
    most = (500, 250, 60)[table]  # the rate of a white pixel at severity 1, so that one program serves all severities
    counts = np.arange(1 << (most + 8 * math.isqrt(most) + 8).bit_length())
    return special.pdtr(counts, np.arange(256)[:, None] / 255 * photons), photons


def _shot_noise(keys_B, x, below_256xK, photons):
    u = _draws(jax.random.uniform, keys_B, x.shape[1:])
    level, steps = jnp.round(x * 255).astype(jnp.int32), below_256xK.shape[1].bit_length() - 1

    def halve(n: Array, count: Array) -> Array:  # the first count where the distribution reaches u
        further = count + (1 << (steps - 1 - n))
        return jnp.where(below_256xK[level, further - 1] < u, further, count)

    return lax.fori_loop(0, steps, halve, jnp.zeros_like(level)) / photons


def _impulse_noise(keys_B, x, amount):
    hit, salt = (_draws(jax.random.uniform, keys, x.shape[1:]) for keys in _split(keys_B, 2))
    return jnp.where(hit < amount, (salt < 0.5).astype(x.dtype), x)


# ---- blur


def _disk(side: int, table: int, radius: float, alias: float) -> tuple[np.ndarray]:
    """A disk of constant weight with a soft edge, without the zeros around it."""
    reach = 8 if radius <= 8 else int(radius)
    line = np.arange(-reach, reach + 1)
    disk = line[:, None] ** 2 + line**2 <= radius**2
    disk = disk / disk.sum()
    taps = np.arange(-1, 2) if radius <= 8 else np.arange(-2, 3)
    soft = np.exp(-(taps**2) / (2 * alias**2))
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, soft / soft.sum(), axis=axis, mode="mirror")
    needed = min(reach, int(radius) + len(taps) // 2)
    inside = slice(reach - needed, reach + needed + 1)
    return (disk[inside, inside],)


def _defocus_blur(keys_B, x, disk_WxW):
    reach, channels = disk_WxW.shape[0] // 2, x.shape[-1]
    padded = jnp.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="reflect")
    kernel = jnp.broadcast_to(disk_WxW[:, :, None, None], (*disk_WxW.shape, 1, channels))
    return lax.conv_general_dilated(
        padded, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=channels,
        precision=lax.Precision.HIGHEST,
    )  # fmt: skip


def _gaussian(side: int, sigma: float, mode: str, truncate: float) -> np.ndarray:
    """The Gaussian filter along an axis, as a matrix [S,S]."""
    eye = np.eye(side)
    return ndimage.gaussian_filter1d(eye, sigma, axis=0, mode=mode, truncate=truncate) if sigma > 0 else eye


def _glass(side: int, table: int, sigma: float, reach: int, rounds: int) -> tuple:
    return _gaussian(side, sigma, "nearest", 4), reach, rounds


def _glass_blur(keys_B, x, blur_SxS, reach, rounds):
    """Between two blurs, every pixel becomes a copy of a near one, from the last pixel to the first.

    The released code means to swap the two, but its assignment between views of one array makes a copy.
    """
    B, S = x.shape[:2]
    reach, rounds = reach.astype(jnp.int32), rounds.astype(jnp.int32)
    x = _bytes(_separable(blur_SxS, x))
    places = S - 2 * reach  # a side: from S - reach down to reach + 1

    def step(n: Array, x: Array) -> Array:
        place = n % places**2
        h, w = S - reach - place // places, S - reach - place % places

        def draw(key: Array) -> Array:
            return jax.random.randint(jax.random.fold_in(key, n), (2,), -reach, reach)

        move_Bx2 = jax.vmap(draw)(keys_B)
        near = x[jnp.arange(B), h + move_Bx2[:, 1], w + move_Bx2[:, 0]]
        return lax.dynamic_update_slice(x, near[:, None, None], (0, h, w, 0))

    x = lax.fori_loop(0, rounds * places**2, step, x)
    return _separable(blur_SxS, x / 255)


def _taps(table: int, radius: float, sigma: float) -> np.ndarray:
    """One half of a Gaussian, padded so that one program serves all severities."""
    i = np.arange(2 * int(radius) + 1)
    half = np.exp(-(i**2) / (2 * sigma**2))
    return np.pad(half / half.sum(), (0, (29, 29, 41)[table] - len(i)))


def _along(x: Array, angle_B: Array, taps_W: Array) -> Array:
    """Weighted mean of x [B,S,S,C] along the direction of an angle [B] in degrees; edges are repeated."""
    S, radians = x.shape[1], jnp.deg2rad(angle_B)
    line = jnp.arange(S)

    def add(total: Array, tap: tuple[Array, Array]) -> tuple[Array, None]:
        i, weight = tap
        down, right = (jnp.ceil(i * f(radians) - 0.5).astype(jnp.int32) for f in (jnp.sin, jnp.cos))
        rows, cols = (jnp.clip(line + move[:, None], 0, S - 1) for move in (down, right))
        return total + weight * jax.vmap(lambda image, r, c: image[r][:, c])(x, rows, cols), None

    total, _ = lax.scan(add, jnp.zeros_like(x), (jnp.arange(len(taps_W), dtype=x.dtype), taps_W))
    return total


def _motion_blur(keys_B, x, taps_W):
    return _along(x, _draws(jax.random.uniform, keys_B, (), minval=-45.0, maxval=45.0), taps_W)


def _zoom(side: int, factor: float) -> np.ndarray:
    """A matrix [S,S] that enlarges the middle of an axis to its whole length, linearly."""
    crop = int(np.ceil(side / factor))
    top = (side - crop) // 2
    enlarged = ndimage.zoom(np.eye(crop), (factor, 1), order=1)
    trim = (len(enlarged) - side) // 2
    return np.pad(enlarged[trim : trim + side], ((0, 0), (top, side - crop - top)))


def _zooms(side: int, table: int, end: float, step: float) -> tuple[np.ndarray]:
    return (np.stack([np.eye(side), *(_zoom(side, factor) for factor in np.arange(1, end, step))]),)


def _zoom_blur(keys_B, x, zooms_ZxSxS):
    total, _ = lax.scan(lambda total, zoom: (total + _separable(zoom, x), None), jnp.zeros_like(x), zooms_ZxSxS)
    return total / len(zooms_ZxSxS)


# ---- weather


def _snow_values(side, table, mean, spread, zoom, threshold, radius, sigma, kept) -> tuple:
    return mean, spread, _zoom(side, zoom), threshold, _taps(table, radius, sigma), kept


def _snow(keys_B, x, mean, spread, zoom_SxS, threshold, taps_W, kept):
    of_flakes, of_angle = _split(keys_B, 2)
    flakes = mean + spread * _draws(jax.random.normal, of_flakes, (*x.shape[1:3], 1))
    flakes = _separable(zoom_SxS, flakes)
    flakes = _bytes(jnp.where(flakes < threshold, 0, flakes)) / 255
    flakes = _along(flakes, _draws(jax.random.uniform, of_angle, (), minval=-135.0, maxval=-45.0), taps_W)
    grey = x @ jnp.array([[0.299], [0.587], [0.114]], x.dtype)
    pale = kept * x + (1 - kept) * jnp.maximum(x, grey * 1.5 + 0.5)
    return pale + flakes + jnp.rot90(flakes, 2, (1, 2))


def _fog(keys_B, x, strength, decay):
    S = x.shape[1]
    haze = _plasma(_draws(jax.random.uniform, keys_B, (1 << (S - 1).bit_length(),) * 2, minval=-1.0), decay)
    lightest = x.max((1, 2, 3), keepdims=True)
    return (x + strength * haze[:, :S, :S, None]) * lightest / (lightest + strength)


def _plasma(noise_BxMxM: Array, decay: Array) -> Array:
    """A cloudy map in [0, 1] by the diamond-square algorithm; each place reads its number of the noise in [-1, 1]."""
    B, M, _ = noise_BxMxM.shape
    clouds, wobble = jnp.zeros((B, 1, 1)), 100.0

    def mean(around: Array, rows: slice, cols: slice) -> Array:
        return around / 4 + wobble**2 * noise_BxMxM[:, rows, cols]

    for n in (1 << level for level in range(M.bit_length() - 1)):  # n places a side become 2n
        old, new = slice(0, None, M // n), slice(M // n // 2, None, M // n)
        pairs = clouds + jnp.roll(clouds, -1, 1)
        middles = mean(pairs + jnp.roll(pairs, -1, 2), new, new)
        right = mean(middles + jnp.roll(middles, 1, 1) + clouds + jnp.roll(clouds, -1, 2), old, new)
        under = mean(middles + jnp.roll(middles, 1, 2) + clouds + jnp.roll(clouds, -1, 1), new, old)
        rows = jnp.stack([jnp.stack([clouds, right], -1), jnp.stack([under, middles], -1)], 2)
        clouds, wobble = rows.reshape(B, 2 * n, 2 * n), wobble / decay
    clouds = clouds - clouds.min((1, 2), keepdims=True)
    return clouds / clouds.max((1, 2), keepdims=True)


def _brightness(keys_B, x, more):
    """Raises the value of HSV: hue and saturation stay, so the channels grow in proportion."""
    value = x.max(-1, keepdims=True)
    lighter = jnp.minimum(value + more, 1)
    return jnp.where(value > 0, x * lighter / jnp.maximum(value, 1e-6), lighter)


# ---- digital


def _contrast(keys_B, x, share):
    mean = x.mean((1, 2), keepdims=True)
    return (x - mean) * share + mean


def _elastic(side: int, table: int, strength: float, smoothness: float, shift: float) -> tuple:
    """Converts shares of the side to pixels."""
    return strength * side, _gaussian(side, smoothness * side, "reflect", 3), shift * side


def _elastic_transform(keys_B, x, strength, smooth_SxS, shift):
    """Moves three corners of the inner square, and the image with them; then every pixel along a smooth field."""
    S = x.shape[1]
    of_affine, of_field = _split(keys_B, 2)
    middle, half = float(S // 2), float(S // 3)
    corners_3x2 = middle + half * jnp.array([[1.0, 1], [1, -1], [-1, -1]])  # (x, y)
    moved = corners_3x2 + shift * _draws(jax.random.uniform, of_affine, (3, 2), minval=-1.0)
    ones = jnp.ones((len(x), 3, 1))
    back_Bx3x2 = jnp.linalg.solve(jnp.concatenate([moved, ones], -1), jnp.broadcast_to(corners_3x2, moved.shape))
    y, across = jnp.meshgrid(jnp.arange(S, dtype=x.dtype), jnp.arange(S, dtype=x.dtype), indexing="ij")
    field = strength * _separable(smooth_SxS, _draws(jax.random.uniform, of_field, (S, S, 2), minval=-1.0))

    def mirror(i: Array) -> Array:
        return S - 1 - jnp.abs(S - 1 - i % (2 * S - 2))

    def reflect(i: Array) -> Array:
        return jnp.minimum(i % (2 * S), 2 * S - 1 - i % (2 * S))

    def warp(image: Array, back_3x2: Array, field_SxSx2: Array) -> Array:
        xy = jnp.stack([across, y, jnp.ones_like(y)], -1) @ back_3x2
        image = _look_up(image, xy[..., 1], xy[..., 0], mirror)
        return _look_up(image, y + field_SxSx2[..., 1], across + field_SxSx2[..., 0], reflect)

    return jax.vmap(warp)(x, back_Bx3x2, field)


def _look_up(image_SxSxC: Array, y: Array, x: Array, inside: Callable[[Array], Array]) -> Array:
    """Bilinear samples of the image; `inside` maps an index outside the image to one inside."""
    total, low_y, low_x = 0.0, jnp.floor(y), jnp.floor(x)
    for row in (low_y, low_y + 1):
        for col in (low_x, low_x + 1):
            share = (1 - jnp.abs(y - row)) * (1 - jnp.abs(x - col))
            pixels = image_SxSxC[inside(row.astype(jnp.int32)), inside(col.astype(jnp.int32))]
            total += share[..., None] * pixels
    return total


def _pixelate(image: Image.Image, share: float) -> Image.Image:
    side = max(1, int(image.width * share))
    return image.resize((side, side), Image.Resampling.BOX).resize(image.size, Image.Resampling.BOX)


def _jpeg_compression(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


class _Kind(NamedTuple):
    """How a corruption is computed.

    apply: (keys [B], pixels [B,S,S,C], *values) -> pixels; with on_host, (Pillow image, *constants) -> Pillow image.
    prepare: (side, table, *constants) -> values; None: the values are the constants.
    """

    apply: Callable
    prepare: Callable | None = None
    on_host: bool = False


_KINDS = {
    "gaussian_noise": _Kind(_gaussian_noise),
    "shot_noise": _Kind(_shot_noise, _photons),
    "impulse_noise": _Kind(_impulse_noise),
    "defocus_blur": _Kind(_defocus_blur, _disk),
    "glass_blur": _Kind(_glass_blur, _glass),
    "motion_blur": _Kind(_motion_blur, lambda side, table, *constants: (_taps(table, *constants),)),
    "zoom_blur": _Kind(_zoom_blur, _zooms),
    "snow": _Kind(_snow, _snow_values),
    "fog": _Kind(_fog),
    "brightness": _Kind(_brightness),
    "contrast": _Kind(_contrast),
    "elastic_transform": _Kind(_elastic_transform, _elastic),
    "pixelate": _Kind(_pixelate, on_host=True),
    "jpeg_compression": _Kind(_jpeg_compression, on_host=True),
}
