"""Breast B-mode phantoms: anatomy drawn at random, imaged by a small model of a linear-array scanner.

The anatomy is geometry in millimetres (layers, ligaments, lobules, one lesion), rasterised once on the *acquisition
grid* of the scanner: ``DEPTHS`` samples on each of ``LINES`` beams. The scanner turns it into an echo envelope, and
only the last step, scan conversion, knows the size of the picture. So a phantom shows the same anatomy and the same
speckle at every size, and its mask is the outline of the lesion evaluated at the pixel centres of that size.

Everything is drawn from ``numpy.random.default_rng([seed, stream, number])``. A patient's stream gives her tissue and
the nature of her lesion, which her ``VIEWS`` images share; an image's own stream gives its plane, speckle and noise.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import scipy.fft
from jaxtyping import Bool, Float, Float32, UInt8
from numpy.random import Generator

from ultrarefiner.data.cases import Case
from ultrarefiner.data.readers import Reader
from ultrarefiner.errors import UserError

FIELD_MM = 40.0  # width and depth of the frame
DEPTHS, LINES = 384, 256  # the acquisition grid
VIEWS = 2  # images of one patient
MALIGNANT_SHARE = 0.4

AXIAL_SIGMA_MM = 0.13  # the envelope of a pulse of about two cycles at 10 MHz
LATERAL_SIGMA_MM = 0.32  # of the beam, at its focus
FOCAL_RANGE_MM = 12.0  # distance from the focus at which the beam is √2 wider
TGC_DB_PER_MM = 1.0  # two-way attenuation of ordinary tissue: 0.5 dB/cm/MHz at 10 MHz
NOISE_DB = -68.0  # electronic noise before time-gain compensation, against the echo of glandular tissue

Map = Float32[np.ndarray, "depths lines"]

_MM_PER_SAMPLE, _MM_PER_LINE = FIELD_MM / DEPTHS, FIELD_MM / LINES
_X, _Z = np.meshgrid(
    (np.arange(LINES, dtype=np.float32) + 0.5) * np.float32(_MM_PER_LINE),
    (np.arange(DEPTHS, dtype=np.float32) + 0.5) * np.float32(_MM_PER_SAMPLE),
)


def make_phantom(
    index: int, seed: int, size: int = 256
) -> tuple[UInt8[np.ndarray, "size size"], Bool[np.ndarray, "size size"]]:
    """The B-mode image (8 bit, FIELD_MM square) and the lesion mask of phantom `index`: always the same ones.

    Args:
        index: which image, from 0; `index // VIEWS` is its patient.
        seed: of the whole series, not negative.
        size: side of the image in pixels; it changes the sampling, not the anatomy.
    """
    patient, view = _streams(index, seed)
    anatomy = _draw_anatomy(patient, view)
    focus_mm = anatomy.lesion.centre[1]  # where the operator sets it
    envelope = acquire(anatomy.echo_db, anatomy.density, anatomy.attenuation, focus_mm, view)
    image = compress(envelope, size, dynamic_range_db=patient.uniform(50, 60), gain_db=view.uniform(-5, 2))
    return image, anatomy.lesion.mask(size)


def is_malignant(index: int, seed: int) -> bool:
    """Whether phantom `index` has a malignant lesion, without drawing it."""
    return bool(_streams(index, seed)[0].random() < MALIGNANT_SHARE)


class Phantoms(Reader):
    """A data set of phantoms: nothing on disk, every image is computed when it is read.

    Args:
        cases: how many images; two successive ones are views of one patient.
        seed: another seed, other patients.
        size: side of the images in pixels.

    Raises:
        UserError: no case, a negative seed, or a size on which the smallest lesion might have no pixel.
    """

    name = "phantom"

    def __init__(self, cases: int = 240, seed: int = 0, size: int = 256) -> None:
        for key, value, least in (("cases", cases, 1), ("seed", seed, 0), ("size", size, 64)):
            if value < least:
                raise UserError(f"dataset.reader.{key}={value} is too small for phantoms: give {least} or more.")
        self.count, self.seed, self.size = cases, seed, size

    def cases(self) -> list[Case]:
        return [
            Case(
                id=f"phantom_{index:04d}",
                dataset=self.name,
                patient=f"patient_{index // VIEWS:04d}",
                label="malignant" if is_malignant(index, self.seed) else "benign",
            )
            for index in range(self.count)
        ]

    def read(self, case: Case) -> tuple[UInt8[np.ndarray, "H W"], Bool[np.ndarray, "H W"]]:
        return make_phantom(int(case.id.removeprefix("phantom_")), self.seed, self.size)


def _streams(index: int, seed: int) -> tuple[Generator, Generator]:
    return np.random.default_rng([seed, 0, index // VIEWS]), np.random.default_rng([seed, 1, index])


# --------------------------------------------------------------------------------------------------------- the scanner


def acquire(echo_db: Map, density: Map, attenuation: Map, focus_mm: float, rng: Generator) -> Map:
    """The echo envelope that a linear array receives from a medium, after time-gain compensation.

    Scatterers of complex Gaussian reflectivity are convolved with the complex envelope of the pulse, which is what
    demodulating the radio-frequency line to baseband gives: its modulus is that of the line's analytic signal, and the
    grid need not resolve the carrier. The point-spread function is separable, a Gaussian along the beam and one across
    it that widens away from the focus. The beams are straight, so what attenuates casts its shadow straight down.

    Args:
        echo_db: mean backscatter, dB against glandular tissue, whose envelope has a mean square of 1.
        density: scatterers per grid cell in (0, 1]; 1 gives fully developed speckle, less is grainier.
        attenuation: two-way, in dB/mm, beyond what the time-gain compensation makes up for; negative enhances.
        focus_mm: depth of the focus.
        rng: source of speckle and noise.
    """
    shape = (DEPTHS, LINES)
    scatterers = _complex_normal(rng) * (_amplitude(echo_db) / np.sqrt(density))
    scatterers *= rng.random(shape, dtype=np.float32) < density

    # Across the beam in the frequency domain, where every depth can have its own width.
    width = LATERAL_SIGMA_MM * np.sqrt(1 + ((_Z[:, :1] - focus_mm) / FOCAL_RANGE_MM) ** 2)
    beam = np.exp(-2 * (np.pi * width * scipy.fft.fftfreq(LINES, _MM_PER_LINE).astype(np.float32)) ** 2)
    beam /= np.sqrt(np.mean(beam**2, axis=1, keepdims=True))  # keeps the mean power
    echoes = scipy.fft.ifft(scipy.fft.fft(scatterers, axis=1) * beam, axis=1)

    # A beam has the width of its aperture: it looks around small things, so their shadows are soft.
    loss_db = cv2.GaussianBlur(np.cumsum(attenuation * np.float32(_MM_PER_SAMPLE), axis=0), (0, 0), 3, sigmaY=1)
    echoes *= _amplitude(-loss_db)
    echoes += _complex_normal(rng) * _amplitude(NOISE_DB + TGC_DB_PER_MM * _Z)

    pulse = cv2.getGaussianKernel(15, AXIAL_SIGMA_MM / _MM_PER_SAMPLE, cv2.CV_32F)
    pulse = pulse / np.linalg.norm(pulse)
    received = cv2.sepFilter2D(echoes.view(np.float32).reshape(*shape, 2), -1, np.ones(1, np.float32), pulse)
    return cv2.magnitude(received[..., 0], received[..., 1])


def compress(envelope: Map, size: int, dynamic_range_db: float, gain_db: float) -> UInt8[np.ndarray, "size size"]:
    """Scan conversion to size × size pixels and log compression to 8 bit; white is 24 dB above glandular tissue."""
    converted = cv2.resize(envelope, (size, size), None, 0, 0, cv2.INTER_AREA if size <= LINES else cv2.INTER_LINEAR)
    level_db = 20 * np.log10(converted + np.float32(1e-6)) + np.float32(gain_db - 24)
    return np.asarray(np.rint(255 * np.clip(1 + level_db / np.float32(dynamic_range_db), 0, 1)), dtype=np.uint8)


def _amplitude(level_db: Map) -> Map:
    return np.asarray(np.exp(level_db * np.float32(np.log(10) / 20)))


def _complex_normal(rng: Generator) -> np.ndarray:
    """Circular complex Gaussian samples of unit power on the acquisition grid: the power is exponential, the phase any.

    Box and Muller's way, in two thirds of the time that two normal variates take.
    """
    chance, phase = rng.random((2, DEPTHS, LINES), dtype=np.float32)
    parts = cv2.polarToCart(np.sqrt(-np.log1p(-chance)), np.float32(2 * np.pi) * phase)
    return cv2.merge(parts).view(np.complex64)[..., 0]


# ---------------------------------------------------------------------------------------------------------- the lesion


@dataclass(frozen=True)
class Lesion:
    """A star-shaped lesion: the distance in mm of its outline from its centre, at evenly spaced angles."""

    centre: tuple[float, float]  # x and depth, mm
    radii: Float32[np.ndarray, " angles"]

    def polar(self, x: Float[np.ndarray, "h w"], z: Float[np.ndarray, "h w"]) -> tuple[np.ndarray, np.ndarray]:
        """Of points given in mm: the radial distance to the outline (mm, negative inside) and the angle in [0, 2π)."""
        radius, angle = cv2.cartToPolar(x - np.float32(self.centre[0]), z - np.float32(self.centre[1]))
        nearest = (angle * np.float32(len(self.radii) / (2 * np.pi))).astype(np.int32) % len(self.radii)
        return radius - self.radii[nearest], angle

    @property
    def height_mm(self) -> float:
        """From its top to its bottom."""
        return float(np.ptp(self.radii * np.sin(np.linspace(0, 2 * np.pi, len(self.radii), endpoint=False))))

    def mask(self, size: int) -> Bool[np.ndarray, "size size"]:
        """The lesion's body on size × size pixels over the frame: the pixels whose centre lies inside the outline."""
        along = (np.arange(size, dtype=np.float32) + 0.5) * np.float32(FIELD_MM / size)
        inside = (self.polar(*np.meshgrid(along, along))[0] <= 0).astype(np.uint8)
        # The tip of a spicule can be thinner than a pixel: what that detaches is no part of the body.
        _, parts, stats, _ = cv2.connectedComponentsWithStats(inside, connectivity=4)
        return np.asarray(parts == 1 + stats[1:, cv2.CC_STAT_AREA].argmax())


def _draw_lesion(patient: Generator, view: Generator, malignant: bool, depths_mm: tuple[float, float]) -> Lesion:
    """A lesion of 5 to 35 % of the frame's width, wholly inside the frame, its centre in the given range if it fits.

    Benign outlines go from smooth to lobulated and lie wider than tall, malignant ones go from angular to spiculated
    and stand taller than wide. The views of a patient differ in what the plane decides: place, tilt, some of the size,
    and where the spicules are cut.
    """
    angle = np.linspace(0, 2 * np.pi, 2048, endpoint=False)
    roughness = patient.uniform(0.0, 1.0)
    tall = patient.uniform(0.9, 1.4) if malignant else patient.uniform(0.45, 0.85)
    tilt = view.normal(0, 0.2)
    radii = 1 / np.hypot(tall * np.cos(angle - tilt), np.sin(angle - tilt))

    order = np.arange(2, 14)
    strength = (0.08 + 0.08 * roughness) if malignant else (0.02 + 0.16 * roughness)
    amplitude = strength * patient.normal(size=order.size) / (order / 2) ** (0.8 if malignant else 2.0)
    phase = patient.uniform(0, 2 * np.pi, order.size) + view.normal(0, 0.3, order.size)
    radii *= np.exp((amplitude[:, None] * np.cos(order[:, None] * angle + phase[:, None])).sum(0))
    if malignant:
        for _ in range(int(patient.integers(3, 7) + 10 * roughness)):
            away = np.abs((angle - view.uniform(0, 2 * np.pi) + np.pi) % (2 * np.pi) - np.pi)
            height = view.uniform(0.1, 0.2 + 0.6 * roughness)
            radii *= 1 + height * np.exp(-away / view.uniform(0.05, 0.14))  # a cusp: broad base, fine tip

    outline = radii * np.stack([np.cos(angle), np.sin(angle)])
    low, high = outline.min(1), outline.max(1)
    width = FIELD_MM * np.clip(patient.triangular(0.05, 0.25, 0.35) * view.uniform(0.9, 1.1), 0.05, 0.35)
    scale = min(width / (high[0] - low[0]), 24.0 / (high[1] - low[1]))
    margin = 1.0
    x = view.uniform(margin - scale * low[0], FIELD_MM - margin - scale * high[0])
    z = np.clip(view.uniform(*depths_mm), 3.0 - scale * low[1], FIELD_MM - margin - scale * high[1])
    return Lesion((float(x), float(z)), (scale * radii).astype(np.float32))


# --------------------------------------------------------------------------------------------------------- the anatomy


@dataclass(frozen=True)
class _Anatomy:
    """What the scanner looks at; see `acquire` for the maps."""

    lesion: Lesion
    echo_db: Map
    density: Map
    attenuation: Map


def _draw_anatomy(patient: Generator, view: Generator) -> _Anatomy:
    """Skin, subcutaneous fat, gland, retromammary fat and pectoral muscle, with a lesion and what resembles one."""
    malignant = patient.random() < MALIGNANT_SHARE
    thickness = patient.uniform((1.2, 3.0, 11.0, 1.0, 6.0), (2.0, 8.0, 18.0, 3.0, 10.0))
    skin, fat, gland, retro, muscle = np.cumsum(thickness * view.uniform(0.9, 1.1, 5)).tolist()
    lesion = _draw_lesion(patient, view, malignant, (fat + 0.15 * (gland - fat), fat + 0.75 * (gland - fat)))
    distance, angle = lesion.polar(_X, _Z)

    # Depth along the layers: they undulate below the skin, bulge around a benign lesion, a malignant one draws them in.
    wave = _noise(view, 1, 6) * view.uniform(0.5, 1.5)
    pull = (0.25 if malignant else -0.5) * np.exp(-np.maximum(distance, 0) / 2.5)
    level = _Z - wave * np.minimum(_Z / 8, 1) + pull * (_Z - lesion.centre[1])
    rows, columns = level / _MM_PER_SAMPLE, _X / _MM_PER_LINE

    def layered(texture: Map) -> Map:
        return cv2.remap(texture, columns, rows, cv2.INTER_LINEAR, None, cv2.BORDER_REFLECT)

    patches = _noise(view, 6, 8)
    fibres, strands = layered(_noise(view, 70, 9)), layered(_noise(view, 45, 12))
    septa = np.exp(-((layered(_noise(view, 12, 9)) / 0.16) ** 2)) * _step(patches + 0.4, 0.5)
    islands = _step(layered(_noise(view, 14, 7)) - patient.uniform(0.9, 2.0), 0.2)  # of fat within the gland
    fat_db, muscle_db = patient.uniform(-13, -9), patient.uniform(-13, -8)

    below = [_step(level - depth, 0.12) for depth in (skin, fat, gland, retro, muscle)]
    in_gland = (below[1] - below[2]) * (1 - islands)
    in_fat = below[0] - below[3] - in_gland
    in_muscle = below[3] - below[4]
    echo_db = (
        (1 - below[0]) * (3 - 6 * np.exp(-(((level - 0.6 * skin) / 0.25) ** 2)))
        + in_fat * (fat_db + 14 * septa + 1.5 * strands)
        + in_gland * (3.5 * fibres + 2.5 * strands + 2 * patches)
        + in_muscle * (muscle_db + 10 * np.maximum(fibres - 0.5, 0) + strands)
        + below[4] * (muscle_db - 4 + 3 * fibres)
    )
    specular = _step(patches + 0.5, 0.4)  # a fascia is bright where it is square to the beam
    for depth, gain_db in ((skin, 10), (fat, 10), (gland, 8), (retro, 14), (muscle, 16)):
        echo_db += gain_db * specular * np.exp(-(((level - depth) / 0.22) ** 2))
    echo_db += 14 * _ligaments(view, skin, fat + 0.4 * (gland - fat))
    density = 0.35 * in_fat + 0.6 * in_muscle + 0.8 * (1 - in_fat - in_muscle)
    attenuation = np.full_like(echo_db, view.uniform(-0.12, 0.12))  # the operator's time-gain compensation is not exact
    attenuation += _distractors(view, lesion, echo_db, (skin, gland))

    look = _malignant if malignant else _benign
    inside, own_db, rim_db, own_attenuation = look(patient, view, lesion.height_mm, distance, angle)
    echo_db += inside * (own_db - echo_db) + rim_db
    density += inside * (0.8 - density)
    return _Anatomy(lesion, echo_db, density, attenuation + own_attenuation)


def _benign(
    patient: Generator, view: Generator, height_mm: float, distance: Map, angle: Map
) -> tuple[Map, Map, Map, Map]:
    """A homogeneous mass or a cyst: sharp edge, thin bright capsule, enhancement behind it, shadows at its edges.

    Returns:
        how much of a sample is lesion, the echo there and the echo added around it in dB, and the attenuation in dB/mm.
    """
    kind = patient.random()
    contrast_db = -34.0 if kind < 0.15 else patient.uniform(-14, -11) if kind < 0.35 else patient.uniform(-24, -16)
    inside = _step(-distance, patient.uniform(0.08, 0.2))
    capsule_db = patient.uniform(2, 8) * np.exp(-((distance / 0.25) ** 2)) * np.sin(angle) ** 2  # specular
    # What meets the edge at a grazing angle is refracted away.
    attenuation = patient.uniform(0, 1.5) * np.exp(-((distance / 0.5) ** 2)) * (np.cos(angle) ** 2) ** 4
    attenuation -= inside * (patient.uniform(3, 8) / height_mm)
    return inside, contrast_db + _noise(view, 10, 10), capsule_db, attenuation


def _malignant(
    patient: Generator, view: Generator, height_mm: float, distance: Map, angle: Map
) -> tuple[Map, Map, Map, Map]:
    """A heterogeneous mass: indistinct edge, echogenic halo crossed by strands, shadow behind it, sometimes calcium.

    Returns:
        the same as `_benign`.
    """
    contrast_db = patient.uniform(-11, -9) if patient.random() < 0.25 else patient.uniform(-22, -12)
    own_db = contrast_db + 2.5 * _noise(view, 14, 14)
    if patient.random() < 0.3:
        own_db += 22 * (view.random((DEPTHS, LINES), dtype=np.float32) < 0.002)
    inside = _step(-distance, patient.uniform(0.12, 0.4))
    strands = np.interp(angle, np.linspace(0, 2 * np.pi, 61), view.normal(size=61)).astype(np.float32)
    halo_db = (patient.uniform(3, 8) + 4 * strands) * (1 - inside)
    halo_db *= np.exp(-np.maximum(distance, 0) / patient.uniform(0.6, 1.8))
    return inside, own_db, halo_db, inside * (patient.uniform(5, 18) / max(height_mm, 5.0))


def _ligaments(view: Generator, top: float, bottom: float) -> Map:
    """Cooper's ligaments, thin curved strands that climb from the gland to the skin: 1 on a strand, 0 elsewhere."""
    canvas = np.zeros((DEPTHS, LINES), np.uint8)
    along = np.linspace(0, 1, 12)
    for _ in range(view.integers(5, 11)):
        x = view.uniform(0, FIELD_MM) + view.normal(0, 5) * along + view.normal(0, 1.5) * np.sin(np.pi * along)
        z = bottom + (top - bottom) * along * view.uniform(0.6, 1)
        points = np.stack([x / _MM_PER_LINE, z / _MM_PER_SAMPLE], axis=1)
        cv2.polylines(canvas, [np.rint(points * 16).astype(np.int32)], False, 255, 1, cv2.LINE_AA, shift=4)
    return canvas.astype(np.float32) / 255


def _distractors(view: Generator, lesion: Lesion, echo_db: Map, depths_mm: tuple[float, float]) -> Map:
    """Draw into `echo_db` what resembles a lesion, fat lobules and vessels, and return the attenuation of shadows."""
    attenuation = np.zeros_like(echo_db)
    for _ in range(view.integers(1, 5)):
        vessel = view.random() < 0.25
        lows, highs = ((0.8, 0.5), (1.6, 0.9)) if vessel else ((1.5, 0.8), (4.5, 2.0))
        half_width, half_height = view.uniform(lows, highs).tolist()
        x, z = view.uniform(0, FIELD_MM), view.uniform(*depths_mm)
        reach = np.hypot(x - lesion.centre[0], z - lesion.centre[1]) - half_width - 1.0
        if reach < lesion.radii.max():
            continue  # it would blur what the lesion is
        distance = (cv2.magnitude((_X - x) / half_width, (_Z - z) / half_height) - 1) * np.float32(half_height)
        inside = _step(-distance, 0.15)
        echo_db += inside * ((view.uniform(-24, -16) if vessel else view.uniform(-10, -6)) - echo_db)
        echo_db += view.uniform(0, 5) * np.exp(-((distance / 0.25) ** 2))
    for _ in range(view.integers(0, 3)):  # behind a ligament
        x, width, start = view.uniform(0, FIELD_MM), view.uniform(0.4, 1.2), view.uniform(2, 15)
        attenuation += view.uniform(1, 4) * np.exp(-(((_X - x) / width) ** 2) - ((_Z - start) / 1.5) ** 2)
    if view.random() < 0.3:  # where the transducer lifts off at one side
        lifted = _X if view.random() < 0.5 else FIELD_MM - _X
        attenuation += view.uniform(3, 8) * _step(view.uniform(1, 4) - lifted, 0.8) * np.exp(-((_Z / 2) ** 2))
    return attenuation


def _noise(rng: Generator, rows: int, columns: int) -> Map:
    """A smooth random field with values of about ±1 and some `rows` × `columns` features."""
    coarse = rng.standard_normal((rows, columns), dtype=np.float32)
    return cv2.resize(coarse, (LINES, DEPTHS), None, 0, 0, cv2.INTER_CUBIC)


def _step(distance: Map, softness: float) -> Map:
    """From 0 to 1 where `distance` crosses zero, over a width of 4 × softness."""
    return np.asarray(np.clip(distance * np.float32(0.25 / softness) + np.float32(0.5), 0, 1))
