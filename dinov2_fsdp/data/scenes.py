"""The embedded data set: labelled scenes drawn by a renderer, so that a run needs no download.

Every scene shows a few objects of one of ten classes. A class is an outline together with a coat (a heart is
dotted, a star is ringed), much as an animal has both. All else is drawn without looking at the class: for each
object anew its place, size, rotation, perspective and every colour, and for the scene the light, the background,
small plain distractors and the camera's noise. Colours therefore tell nothing and pixels little. What two
crops of a scene share, and a network can find without labels, is what its objects have in common.

A scene is a pure function of ``(seed, index)``; ``size`` only sets the grid on which it is sampled.
Coordinates run from -1 to 1 over the frame, rows downwards. Colours are mixed in linear light.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from dinov2_fsdp.rng import generator

Plane = NDArray[np.floating]  # float32 throughout; two axes, or three with the colour channels first
Draw = dict[str, float]


@dataclass(frozen=True)
class Scene:
    """One rendered scene with everything that is known about it.

    ``image`` is (size, size, 3) uint8 RGB; ``label`` an index into ``CLASSES``; ``mask`` (size, size) uint8 holds
    ``1 + label`` on the object and 0 elsewhere (distractors count as background); ``depth`` (size, size) float32
    is in metres.
    """

    image: NDArray[np.uint8]
    label: int
    mask: NDArray[np.uint8]
    depth: NDArray[np.float32]


def render(seed: int, index: int, size: int = 64) -> Scene:
    """Return scene ``index`` of the data set ``seed``, sampled on a ``size`` by ``size`` grid.

    The same ``(seed, index, size)`` gives the same bytes. Ten scenes from a multiple of ten on hold each class once.
    """
    label = label_of(seed, index)
    rng = generator(seed, "scene", index)
    draw = _draw(rng, _SCENE_RANGES)
    x, y = _grid(size)
    ground = (draw["distance"] / (1.0 + draw["tilt_x"] * x + draw["tilt_y"] * y)).astype(np.float32)

    tone = draw["tone_background"]
    light = _mix(_paint(rng, tone, 0.5, 0.3), _background(rng, draw, x, y))
    depth = ground
    colours = _paint(rng, 0.3, 0.3, 0.9)
    for colour, place in zip(colours, rng.random((_DISTRACTORS, 6)).tolist(), strict=True):
        light, depth = _add_distractor(light, depth, ground, colour, place, x, y)
    objects = _arrange(rng, label, size)
    everything = np.zeros((size, size), np.float32)
    for item in objects:
        everything[item.window] = np.maximum(everything[item.window], item.coverage)
    light *= 1.0 - draw["shadow"] * _shadow(everything, draw)

    mask = np.zeros((size, size), np.uint8)
    depth = depth.copy()
    for item in objects:
        here = item.window
        surface = _surface(rng, label, item, draw, size)
        light[:, here[0], here[1]] += (surface - light[:, here[0], here[1]]) * item.coverage
        inside = item.coverage > 0.5
        near = ground[here] * (item.draw["nearness"] - item.draw["bulge"] * item.rise * (2.0 - item.rise))
        depth[here] = np.where(inside, near, depth[here])
        mask[here][inside] = 1 + label
    return Scene(image=_expose(rng, draw, light), label=label, mask=mask, depth=depth.astype(np.float32))


@dataclass(frozen=True)
class _Object:
    """One object on the part of the grid that it can touch, ``window``: the planes have the window's shape."""

    draw: Draw
    window: tuple[slice, slice]
    x: Plane  # coordinates on the object
    y: Plane
    rise: Plane
    slope_x: Plane
    slope_y: Plane
    coverage: Plane


def _draw(rng: np.random.Generator, ranges: dict[str, tuple[float, float]]) -> Draw:
    low, high = np.array(list(ranges.values())).T
    return dict(zip(ranges, rng.uniform(low, high).tolist(), strict=True))


def _arrange(rng: np.random.Generator, label: int, size: int) -> list[_Object]:
    """Return the scene's objects, the farthest first, spread around the middle of the frame."""
    count = int(rng.integers(*_OBJECTS, endpoint=True))
    start = rng.uniform(0.0, _TURN)
    objects = []
    for number in range(count):
        draw = _draw(rng, _OBJECT_RANGES)
        angle = start + _TURN / count * (number + draw["place_angle"])
        draw["place_x"] = draw["place_radius"] * float(np.cos(angle))
        draw["place_y"] = draw["place_radius"] * float(np.sin(angle))
        objects.append(_outlined(label, draw, size))
    return sorted((item for item in objects if item.coverage.size), key=lambda item: -item.draw["nearness"])


def _outlined(label: int, draw: Draw, size: int) -> _Object:
    reach = _standard_frame(label)[3] * draw["diameter"] * _DISTORTION
    spans = []
    for middle in (draw["place_y"], draw["place_x"]):
        first, last = ((middle + side * reach + 1.0) * 0.5 * size for side in (-1, 1))
        low = min(max(0, int(first) - 1), size - 3)
        spans.append(slice(low, max(min(size, int(last) + 2), low + 3)))
    window = (spans[0], spans[1])
    x, y = (plane[window] for plane in _grid(size))
    x, y = _object_coordinates(x, y, draw)
    outline, slope_x, slope_y, coverage = _outline(label, x, y)
    rise = np.clip(outline * (1.0 / _BEVEL), 0.0, 1.0)
    return _Object(draw, window, x, y, rise, slope_x, slope_y, coverage)


def _surface(rng: np.random.Generator, label: int, item: _Object, scene: Draw, size: int) -> Plane:
    """Return the light (3, …) that an object's surface sends, over its window."""
    draw = item.draw
    x, y = (plane[item.window] for plane in _grid(size))
    diffuse, highlight = _shade(item, scene)
    tones = (draw["tone_dark"], draw["tone_dark"] + draw["tone_step"])
    if draw["tone_order"] < 0.5:
        tones = tones[::-1]
    colours = [_paint(rng, tone, 0.3, 0.9) for tone in tones]
    first = _mix(colours[0], _ramp(x, y, draw["ramp_first"]))
    second = _mix(colours[1], _ramp(x, y, draw["ramp_second"]))
    coat = _coat(rng, label, item.x, item.y, draw, 2.0 / (size * draw["diameter"]))
    return (first + (second - first) * coat) * diffuse + highlight


# What is drawn, alike for all classes: name -> (low, high), uniform.
_TURN = 2 * np.pi
_OBJECT_RANGES: dict[str, tuple[float, float]] = {
    "diameter": (0.32, 0.5),  # of the disc of the object's area, as a share of the frame
    "place_angle": (-0.25, 0.25),  # off its even share of the turn, in shares
    "place_radius": (0.3, 0.8),  # from the middle of the frame; 1 is an edge
    "rotation": (-0.4, 0.4),
    "stretch": (-0.12, 0.12),
    "shear": (-0.12, 0.12),
    "perspective_x": (-0.12, 0.12),
    "perspective_y": (-0.12, 0.12),
    "coat_rotation": (-0.3, 0.3),
    "coat_frequency": (0.75, 1.25),
    "coat_balance": (-0.09, 0.09),
    "coat_softness": (0.02, 0.10),
    "tone_dark": (0.02, 0.15),
    "tone_step": (0.35, 0.65),
    "tone_order": (0.0, 1.0),
    "ramp_first": (0.0, _TURN),
    "ramp_second": (0.0, _TURN),
    "relief": (0.5, 1.4),
    "gloss": (0.0, 0.35),
    "nearness": (0.6, 0.8),
    "bulge": (0.03, 0.12),
}
_SCENE_RANGES: dict[str, tuple[float, float]] = {
    "tone_background": (0.15, 0.35),
    "background_kind": (0.0, 4.0),
    "background_rotation": (0.0, _TURN),
    "background_frequency": (1.0, 3.0),
    "background_contrast": (0.03, 0.12),
    "light_azimuth": (0.0, _TURN),
    "light_elevation": (0.55, 1.2),
    "ambient": (0.35, 0.5),
    "shadow": (0.3, 0.5),
    "shadow_offset": (0.06, 0.22),
    "shadow_blur": (0.04, 0.12),
    "gain": (0.95, 1.1),
    "vignette": (0.0, 0.1),
    "noise": (0.005, 0.010),
    "distance": (1.5, 6.0),  # metres
    "tilt_x": (-0.12, 0.12),
    "tilt_y": (0.05, 0.3),  # the ground comes nearer towards the lower edge
}
_OBJECTS = (4, 5)
_DISTORTION = 1.5  # how much farther stretch, shear and perspective can take a point of an outline
_DISTRACTORS = 2
_BEVEL = 0.55
_COAT_POINTS = 48


def label_of(seed: int, index: int) -> int:
    """Return the label of a scene without drawing it."""
    block, place = divmod(index, len(CLASSES))
    return int(generator(seed, "scene label", block).permutation(len(CLASSES))[place])


@cache
def _grid(size: int) -> tuple[Plane, Plane]:
    centres = ((np.arange(size) + 0.5) * (2.0 / size) - 1.0).astype(np.float32)
    return np.broadcast_to(centres[None, :], (size, size)), np.broadcast_to(centres[:, None], (size, size))


def _turned(x: Plane, y: Plane, angle: float) -> tuple[Plane, Plane]:
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    return cos * x + sin * y, cos * y - sin * x


def _object_coordinates(x: Plane, y: Plane, draw: Draw) -> tuple[Plane, Plane]:
    scale = 1.0 / draw["diameter"]
    x, y = (x - draw["place_x"]) * scale, (y - draw["place_y"]) * scale
    depth = 1.0 + draw["perspective_x"] * x + draw["perspective_y"] * y
    x, y = _turned(x / depth, y / depth, draw["rotation"])
    stretch = float(np.exp(draw["stretch"]))  # area-preserving, as the shear is
    return stretch * x + draw["shear"] * y, y / stretch


# Outlines: positive inside, zero on the edge, about a distance near it.


def _folded(x: Plane, y: Plane, count: int) -> tuple[Plane, Plane]:
    """Polar coordinates with the angle folded into one of ``count`` mirrored sectors around 0."""
    sector = _TURN / count
    angle = np.arctan2(x, y)
    return np.hypot(x, y), angle - sector * np.rint(angle * (1.0 / sector))


def _disc(x: Plane, y: Plane) -> Plane:
    return 1.0 - np.hypot(x, y)


def _cross(x: Plane, y: Plane) -> Plane:
    across, along = np.abs(x), np.abs(y)
    return np.minimum(1.0 - np.maximum(across, along), 0.38 - np.minimum(across, along))


def _heart(x: Plane, y: Plane) -> Plane:
    return 1.0 - np.hypot(x, 1.15 * y + 0.8 * (x * x + 0.004) ** 0.25 - 0.3)


def _star(x: Plane, y: Plane) -> Plane:
    radius, angle = _folded(x, y, 5)
    return 0.42 - (radius * np.cos(angle) * 0.42 + radius * np.abs(np.sin(angle)) * 0.82)


def _triangle(x: Plane, y: Plane) -> Plane:
    radius, angle = _folded(x, y, 3)
    return 0.55 - radius * np.cos(angle)


def _ring(x: Plane, y: Plane) -> Plane:
    return 0.37 - np.abs(np.hypot(x, y) - 0.72)


def _gear(x: Plane, y: Plane) -> Plane:
    radius, angle = _folded(x, y, 9)
    teeth = np.clip(2.5 * np.cos(9.0 * angle), -1.0, 1.0)
    return np.minimum(0.9 + 0.12 * teeth - radius, radius - 0.2)


def _flower(x: Plane, y: Plane) -> Plane:
    radius, angle = _folded(x, y, 6)
    return 0.85 + 0.2 * np.cos(6.0 * angle) - radius


def _crescent(x: Plane, y: Plane) -> Plane:
    return np.minimum(1.0 - np.hypot(x, y), np.hypot(x - 0.55, y) - 0.75)


def _leaf(x: Plane, y: Plane) -> Plane:
    return 1.25 - np.hypot(np.abs(x) + 0.72, y)


# Coats: about the distance to the nearest change of tone, signed; x and y in periods of the pattern.


def _cell(x: Plane) -> Plane:
    return x - np.rint(x)


def _stripes(x: Plane, y: Plane, points: Plane) -> Plane:
    return 0.25 - np.abs(_cell(x))


def _checks(x: Plane, y: Plane, points: Plane) -> Plane:
    return np.sin(np.pi * 1.2 * x) * np.sin(np.pi * 1.2 * y) * 0.3


def _dots(x: Plane, y: Plane, points: Plane) -> Plane:
    row = np.rint(y * 1.1)
    return 0.36 - np.hypot(_cell(x + 0.5 * row), y - row / 1.1)


def _rings(x: Plane, y: Plane, points: Plane) -> Plane:
    centre = points[0] - 0.5
    return 0.25 - np.abs(_cell(np.hypot(x - centre[0], y - centre[1])))


def _zigzag(x: Plane, y: Plane, points: Plane) -> Plane:
    return 0.25 - np.abs(_cell(x + 1.1 * np.abs(_cell(0.62 * y))))


def _bricks(x: Plane, y: Plane, points: Plane) -> Plane:
    row = np.rint(y * 1.3)
    across = 0.5 - np.abs(_cell(0.6 * x + 0.5 * row))
    return np.minimum(across * (1.0 / 0.6), 0.5 / 1.3 - np.abs(y - row / 1.3)) - 0.15


def _cells(x: Plane, y: Plane, points: Plane) -> Plane:
    column, row = np.divmod(np.arange(_COAT_POINTS, dtype=np.float32), 7)
    centres = 0.9 * (np.stack([column, row], 1) - 3.0 + 0.8 * points)
    place = np.stack([x.ravel(), y.ravel()])
    # Squared distances less the |place|² that all centres share.
    squares = (-2.0 * centres) @ place + (centres * centres).sum(axis=1, keepdims=True)
    nearest = squares.min(axis=0)
    second = np.where(squares > nearest, squares, np.float32(np.inf)).min(axis=0)
    shared = (place * place).sum(axis=0)
    apart = np.sqrt(np.maximum(second + shared, 0.0)) - np.sqrt(np.maximum(nearest + shared, 0.0))
    return (0.5 * apart - 0.13).reshape(x.shape)


def _spiral(x: Plane, y: Plane, points: Plane) -> Plane:
    return 0.25 - np.abs(_cell(0.75 * np.hypot(x, y) + np.arctan2(y, x) * (3.0 / _TURN)))


def _mottles(x: Plane, y: Plane, points: Plane) -> Plane:
    # Plane waves of nearly one wavelength in all directions: the spots of a reaction and diffusion.
    angle = (np.arange(7, dtype=np.float32) + points[:7, 0]) * np.float32(np.pi / 7)
    wave = (_TURN * (0.75 + 0.5 * points[:7, 1]))[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    waves = np.cos(wave @ np.stack([x.ravel(), y.ravel()]) + _TURN * points[7:14, :1])
    return 0.09 * waves.sum(axis=0).reshape(x.shape)


def _scales(x: Plane, y: Plane, points: Plane) -> Plane:
    row = np.floor(2.0 * y)
    above = y - 0.5 * row
    across = np.abs(_cell(x + 0.5 * row))
    own = np.hypot(across, above)
    behind = np.hypot(across - 0.5, above - 0.5)
    return np.where(own < 0.5, own, behind) - 0.3


_KINDS: dict[str, tuple[Callable[[Plane, Plane], Plane], Callable[[Plane, Plane, Plane], Plane]]] = {
    "striped disc": (_disc, _stripes),
    "checked cross": (_cross, _checks),
    "dotted heart": (_heart, _dots),
    "ringed star": (_star, _rings),
    "zigzag triangle": (_triangle, _zigzag),
    "bricked ring": (_ring, _bricks),
    "cellular gear": (_gear, _cells),
    "spiral flower": (_flower, _spiral),
    "mottled crescent": (_crescent, _mottles),
    "scaly leaf": (_leaf, _scales),
}
CLASSES: tuple[str, ...] = tuple(_KINDS)


@cache
def _standard_frame(label: int) -> tuple[float, float, float, float]:
    """Centre of gravity and scale that give every outline the area of the unit disc, so that area tells no class.

    The last number is how far the scaled outline reaches from its centre.
    """
    x, y = (2.0 * plane for plane in _grid(256))
    inside = _KINDS[CLASSES[label]][0](x, y) > 0
    centre_x, centre_y = float(x[inside].mean()), float(y[inside].mean())
    scale = float(np.sqrt(inside.mean() * 16.0 / np.pi))
    reach = float(np.hypot(x[inside] - centre_x, y[inside] - centre_y).max()) / scale
    return centre_x, centre_y, scale, reach


def _outline(label: int, x: Plane, y: Plane) -> tuple[Plane, Plane, Plane, Plane]:
    """Return the outline function, its unit gradient in the image (two planes) and the share of each pixel covered."""
    centre_x, centre_y, scale, _ = _standard_frame(label)
    outline = _KINDS[CLASSES[label]][0](x * scale + centre_x, y * scale + centre_y) / scale
    slope_x, slope_y = np.empty_like(outline), np.empty_like(outline)
    slope_x[:, 1:-1] = 0.5 * (outline[:, 2:] - outline[:, :-2])
    slope_y[1:-1] = 0.5 * (outline[2:] - outline[:-2])
    slope_x[:, 0], slope_x[:, -1] = slope_x[:, 1], slope_x[:, -2]
    slope_y[0], slope_y[-1] = slope_y[1], slope_y[-2]
    per_pixel = 1.0 / np.maximum(np.hypot(slope_x, slope_y), 1e-4)
    return outline, slope_x * per_pixel, slope_y * per_pixel, np.clip(outline * per_pixel + 0.5, 0.0, 1.0)


def _coat(rng: np.random.Generator, label: int, x: Plane, y: Plane, draw: Draw, pixel: float) -> Plane:
    """Return the share of the second tone in every pixel, smoothed over a pixel's width at least."""
    points = rng.random((_COAT_POINTS + 1, 2)).astype(np.float32)
    frequency = _COAT_FREQUENCY * draw["coat_frequency"]
    x, y = _turned(x, y, draw["coat_rotation"])
    shift = points[-1] - 0.5
    tone = _KINDS[CLASSES[label]][1](frequency * x + shift[0], frequency * y + shift[1], points[:-1])
    width = frequency * pixel + draw["coat_softness"]
    return np.clip((tone + draw["coat_balance"]) * (1.0 / width) + 0.5, 0.0, 1.0)


_COAT_FREQUENCY = 2.0  # periods per radius of the object


# Colour, background and light.


def _paint(rng: np.random.Generator, tone: float, spread: float, saturation: float) -> Plane:
    """Return two linear RGB colours (2, 3) near a brightness ``tone``: a surface runs from one hue to the other.

    Hues that change within a scene keep two crops of it from being matched by colour alone.
    """
    hue = rng.uniform(0.0, _TURN, (2, 1)) - np.arange(3) * (_TURN / 3)
    tones = tone * (1.0 + spread * rng.uniform(-1.0, 1.0, 2))
    amount = rng.uniform(0.1, saturation, (2, 1))
    return (tones[:, None] * np.clip(1.0 + amount * np.cos(hue), 0.05, None)).astype(np.float32)


def _mix(pair: Plane, share: Plane) -> Plane:
    first, second = pair[:, :, None, None]
    return first + (second - first) * share


def _ramp(x: Plane, y: Plane, angle: float) -> Plane:
    return np.clip(0.5 + float(np.cos(angle)) * x + float(np.sin(angle)) * y, 0.0, 1.0)


@cache
def _interpolation(size: int, knots: int) -> Plane:
    place = (np.arange(size) + 0.5) * ((knots - 1) / size)
    offset = np.abs(place[:, None] - np.arange(knots))
    return (np.where(offset < 1, 0.5 + 0.5 * np.cos(np.pi * np.minimum(offset, 1)), 0)).astype(np.float32)


def _soft_noise(values: Plane, size: int) -> Plane:
    weights = _interpolation(size, len(values))
    return weights @ values @ weights.T


def _background(rng: np.random.Generator, draw: Draw, x: Plane, y: Plane) -> Plane:
    """Return the share of the second background colour: a ramp, soft noise, faint stripes or faint checks."""
    coarse, fine = rng.random((4, 4), dtype=np.float32), rng.random((11, 11), dtype=np.float32) - 0.5
    angle, contrast = draw["background_rotation"], draw["background_contrast"]
    kind = int(draw["background_kind"])
    share = (0.2 + contrast) * _soft_noise(fine, len(x))
    if kind == 1:
        return share + _soft_noise(coarse, len(x))
    share += 0.5 * (_ramp(x, y, angle) + _soft_noise(coarse, len(x)))
    along, across = _turned(x, y, angle)
    if kind == 2:
        share += contrast * np.sin(np.pi * draw["background_frequency"] * along)
    if kind == 3:
        wave = np.pi * draw["background_frequency"]
        share += contrast * np.sign(np.sin(wave * along) * np.sin(wave * across))
    return share


def _add_distractor(
    light: Plane, depth: Plane, ground: Plane, colour: Plane, place: list[float], x: Plane, y: Plane
) -> tuple[Plane, Plane]:
    """Draw a small plain superellipse, or nothing, behind the object; ``place`` holds six numbers from 0 to 1."""
    presence, at_x, at_y, radius, slimness, angle = place
    if presence < 0.4:
        return light, depth
    radius = 0.1 + 0.16 * radius
    along, across = _turned(x - (2.0 * at_x - 1.0), y - (2.0 * at_y - 1.0), _TURN * angle)
    outline = radius - np.hypot(along, across * (1.0 + slimness))
    coverage = np.clip(outline * (0.5 * len(x)) + 0.5, 0.0, 1.0)
    shade = colour[:, None, None] * (0.7 + (0.6 / radius) * outline)
    return light + (shade - light) * coverage, np.where(coverage > 0.5, ground * (0.95 - 0.1 * presence), depth)


def _shadow(coverage: Plane, draw: Draw) -> Plane:
    """Return the object's coverage, moved away from the light and blurred."""
    centres = _grid(len(coverage))[0][0]
    apart = centres[:, None] - centres
    moves = (np.cos(draw["light_azimuth"]), np.sin(draw["light_azimuth"]))
    blur_x, blur_y = (
        np.exp(((apart + float(move * draw["shadow_offset"])) / draw["shadow_blur"]) ** 2 * np.float32(-0.5))
        for move in moves
    )
    norm = (2.0 / len(coverage)) ** 2 / (_TURN * draw["shadow_blur"] ** 2)
    return (blur_y @ coverage @ blur_x.T) * norm


def _shade(item: _Object, draw: Draw) -> tuple[Plane, Plane]:
    """Return Lambert's diffuse factor and a highlight of a surface that rises from the outline and levels off."""
    flat = float(np.cos(draw["light_elevation"]))
    towards_x, towards_y = flat * float(np.cos(draw["light_azimuth"])), flat * float(np.sin(draw["light_azimuth"]))
    steepness = item.draw["relief"] * (1.0 - item.rise)
    facing = float(np.sin(draw["light_elevation"])) - steepness * (towards_x * item.slope_x + towards_y * item.slope_y)
    facing = np.maximum(facing / np.sqrt(1.0 + steepness * steepness), 0.0)
    peak = facing * facing
    peak *= peak
    peak *= peak
    return draw["ambient"] + (1.3 - draw["ambient"]) * facing, item.draw["gloss"] * peak * peak


def _expose(rng: np.random.Generator, draw: Draw, light: Plane) -> NDArray[np.uint8]:
    """Return the camera's picture: exposure, vignette, gamma of 2, noise, 8 bits."""
    x, y = _grid(light.shape[-1])
    light = light * (draw["gain"] - draw["vignette"] * 0.5 * (x * x + y * y))
    signal = np.sqrt(np.clip(light, 0.0, 1.0))
    signal += draw["noise"] * rng.standard_normal(signal.shape, dtype=np.float32)
    return (np.clip(signal, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8).transpose(1, 2, 0).copy()
