"""Make glyph_list.json: the characters that are classes of the glyphs dataset, and the typefaces of each.

Maintainers ran `python -m data_prep.glyph_list` once. Homoglyphs are merged by a threshold on floating-point numbers,
which other versions of Pillow or FreeType may round differently. Therefore the result is a file of the repository.
"""

import json
import sys
import unicodedata
from pathlib import Path

import numpy as np
from matplotlib.ft2font import FT2Font
from tqdm import tqdm

from data_prep.glyph_drawing import FACES, draw, face_checksums, face_path, fit

LIST_FILE = Path(__file__).with_name("glyph_list.json")
MIN_FACES = 12
MIN_DRAWINGS = 10
HOMOGLYPH_COSINE = 0.97
HOMOGLYPH_SHARE = 0.5


def characters_by_face() -> dict[str, list[str]]:
    """List the characters of Unicode categories L, N, P and S that at least MIN_FACES typefaces contain.

    Returns:
        The names of these typefaces, by character.
    """
    faces: dict[int, list[str]] = {}
    for face in FACES:
        for code in FT2Font(str(face_path(face))).get_charmap():
            if unicodedata.category(chr(code))[0] in "LNPS":
                faces.setdefault(code, []).append(face)
    return {chr(code): names for code, names in sorted(faces.items()) if len(names) >= MIN_FACES}


def distinct_drawings(character: str, faces: list[str]) -> dict[str, np.ndarray]:
    """Draw a character in several typefaces and drop equal drawings.

    Args:
        character: The character.
        faces: Names of typefaces.

    Returns:
        Drawings by typeface; of typefaces with equal drawings, the first.
    """
    drawings: dict[bytes, tuple[str, np.ndarray]] = {}
    for face in faces:
        ink = draw(character, face)
        if ink.size:
            drawings.setdefault(ink.shape[0].to_bytes(2, "big") + ink.tobytes(), (face, ink))
    return dict(drawings.values())


def homoglyphs(drawings: dict[str, dict[str, np.ndarray]]) -> dict[str, str]:
    """Group characters that look alike.

    Args:
        drawings: Drawings by character and typeface.

    Returns:
        For each character the first character of its group, which is itself without homoglyphs.
    """
    characters = list(drawings)
    shared = np.zeros((len(characters),) * 2, int)
    alike = np.zeros_like(shared)
    for face in FACES:
        has = [i for i, c in enumerate(characters) if face in drawings[c]]
        vectors = np.stack([fit(drawings[characters[i]][face]).ravel() for i in has]).astype(float)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        shared[np.ix_(has, has)] += 1
        alike[np.ix_(has, has)] += vectors @ vectors.T >= HOMOGLYPH_COSINE
    same = (alike >= HOMOGLYPH_SHARE * shared) & (shared > 0)
    group = list(range(len(characters)))
    for i, j in zip(*np.nonzero(np.triu(same, 1)), strict=True):
        first, second = sorted((group[i], group[j]))
        group = [first if g == second else g for g in group]
    return {c: characters[g] for c, g in zip(characters, group, strict=True)}


def main() -> None:
    """Write glyph_list.json beside this file."""
    drawings = {}
    for character, faces in tqdm(characters_by_face().items(), desc="drawing", unit="characters", mininterval=1):
        drawn = distinct_drawings(character, faces)
        if len(drawn) >= MIN_DRAWINGS:
            drawings[character] = drawn
    groups: dict[str, list[str]] = {}
    for character, first in homoglyphs(drawings).items():
        groups.setdefault(first, []).append(character)
    # A class keeps only the drawings of its first character; its homoglyphs would add nearly equal ones.
    classes = [
        {"character": first, "homoglyphs": members[1:], "faces": sorted(FACES.index(f) for f in drawings[first])}
        for first, members in groups.items()
    ]
    lines = ",\n".join(json.dumps(c) for c in classes)
    head = json.dumps({"faces": list(FACES), "sha256": face_checksums()}, indent=1)
    LIST_FILE.write_text(f'{head[:-2]},\n "classes": [\n{lines}\n]}}\n')
    print(f"{len(classes)} classes, {sum(len(c['faces']) for c in classes)} images: {LIST_FILE.name}", file=sys.stderr)


if __name__ == "__main__":
    main()
