"""formats/ptb.py: the Penn Treebank tokens on which COCO's code scores captions.

A rule is a pair: a pattern for the token, and a pattern for what must follow it, which is looked at and not
taken. Example: ("can", "not") cuts "cannot" into can · not. At each position the rule that reaches furthest
wins. Source: CoreNLP 3.4.1's PTBTokenizer as pycocoevalcap 1.2 calls it; tests/formats/test_ptb.py holds its
tokens.
"""
from __future__ import annotations

import re

LETTER = r"(?:[^\W\d_²³¹¼-¾⅐-⅟]|[\u0300-\u036f])"                   # combining accents belong to the word
ALNUM = rf"(?:\d|{LETTER})"
WORD = rf"{LETTER}{ALNUM}*(?:[.!?]{LETTER}{ALNUM}*)*"                # also photo.jpg and a!b
PART = rf"(?:[dol]['’]{LETTER})?{ALNUM}+"
THING = rf"{PART}(?:[-_‐‑]{PART})*"                                  # two-story, 5x5, o'clock
CLITIC, NOT = r"['’](?:[msd]|re|ve|ll)", r"n['’`]t"
SLASHED = r"[a-z0-9]+(?:-[a-z]+){0,2}"
ABBREVIATIONS = "|".join(r"""(?:ph|ed)\.d adj adm adv al alex apr assn assoc asst atty aug ave bhd bldg blvd
    brig bros capt cf cie co cos col corp cpl ct dec dept det dr drs elec esq etc feb fri ft gen gov govs hon
    inc insp intl jan jos jr jul jun lieut lt ltd maj mar messrs mfg mlle mme mon mr mrs ms mt natl nov oct
    ph plc pres prof profs pty pvt rd rep reps rev rt sen sens sep sept seq sgt sq sr st ste supt sys thu
    thurs tue tues treas univ vs wed wm""".split())
STATES = "|".join("""Ala Ariz Ark Az Calif Colo Conn Dak Del Fla Ga Ill Ind Kan Kans Ky La Mass Md Mich Minn
    Miss Mo Mont Neb Nev Okla Ore Pa Penn Tenn Tex Va Vt Wash Wis Wisc Wyo""".split())
PTB_RULES = [re.compile(f"(?i:({token})(?:{ahead}))") for token, ahead in (  # token, what must follow
    ("can", "not"), ("gon|wan", "na"), ("got", "ta"), ("lem|gim", "me"), ("'t", "is|was"),  # can not, 't is
    (WORD, ""), (THING, ""), (WORD, CLITIC), (THING, CLITIC), ("[a-z]*[a-mo-z]", NOT),      # dog 's, do n't
    (f"{CLITIC}|{NOT}", "(?![a-z])"),
    (rf"(?:{ABBREVIATIONS}|(?-i:{STATES})|[a-z](?:\.[a-z])*)\.", ""),                       # mr. etc. p.m.
    (r"(?:art|ca|est|figs?|nos?|op|pp|prop|tel)\.", r"\s?\d"),                              # no. 5 (no way)
    (r"[-+]?(?:\d*(?:[.:,]\d+)+|\d+)", ""), (r"\d{1,4}[- \u00a0]\d{1,4}/\d{1,4}", ""),      # 1,000 3:30 3 1/2
    (rf"{SLASHED}(?:\\?/{SLASHED}){{1,2}}", ""),                                            # and/or, 9/11/01
    (r"[a-z0-9][a-z0-9.,]*(?:-(?:[a-z0-9]+|[a-z](?:\.[a-z])*\.))+", ""),                    # u.s.-based
    (r"(?-i:[A-Z]+(?:[+&][A-Z]+)+|[A-Z]*\$)|c\+\+|[cf]\#", ""),                             # at&t, us$, c++
    (r"['’](?:n['’]|n(?![a-z])|em|cause|till?|[2-9]0s)", ""), (r"['’]\d\d", r"\s|\Z"),      # 'n', '80s, '98
    ("(?:[ldj]|ol|dunkin|somethin)['’]", ""), ("y['’]", LETTER),                            # ol', y' all
    (r"[cs]['’]mo\w+|nor['’]easter|li['’]l|nat['’]l|ev['’]ry|e['’]er|cont['’]d\.", ""),     # c'mon, s'mores
    (rf"(?-i:[A-HJ-XZn]['’]{LETTER}{{2,}}|{LETTER}+[aeiouyAEIOUY]['’][aeiouA-Z]{LETTER}*)", ""),  # ma'am
    (r"</?[a-z][\w:.-]*(?:\s[^>]*)?/?>|&\#\d+;|-[lr][rsc]b-", ""),                          # <b>
    (r"(?:https?://|www\.)[^\s<>\"|(){}]+[^\s<>\"|.!?(){},-]", ""),
    (r"[a-z0-9][^\s\"<>|(){}]*@(?:[^\s\"<>|(){}.]+\.)*[^\s\"<>|(){}.]+|@[a-z_]\w*|\#[^\W\d_]+", ""),
    (r"(?-i:[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])", "(?![a-z])"), ("[-^x=~<>']_[-^x=~<>']", ""),   # :-) ^_^
    (r"[?!]+|\*+|\#+|@+|_+|<<|>>|-+|\.{3,5}|''|``|\S", ""),                                 # whatever is left
)]
PTB_DROPPED = re.compile("[-–—‒―.…,:;?!\"'`“”‘’‛«»‹›「」]|-{2,4}|\\.{3,5}|''|``")
PTB_REWRITTEN = {"[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "£": "#", "€": "$", "¢": "cents",
                 "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
INVISIBLE = re.compile("[\0-\x1f\u200b-\u200f\u2060\ue000-\uf8ff\ufe00-\ufe0f\ufeff\U00010000-\U0010ffff]")
ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&nbsp;": " ", "\u00ad": ""}


def ptb_tokenize(text: str) -> list[str]:
    """Penn Treebank tokens, lower case, no punctuation: what COCO's code gets from CoreNLP 3.4.1 (Java).

        "A man (in red) doesn't use No. 5!"  →  a man -lrb- in red -rrb- does n't use no. 5

    A lexer like the original: at each position the rule that reaches furthest wins (what it looks ahead at
    counts; of equals the first). Brackets survive as words, because the official list of dropped punctuation
    is upper case and the tokens no longer are; so do "!!" and "?!", because the list has single marks. Emoji
    vanish; 3 1/2 is one token with a no-break space inside. Left out: telephone numbers with blanks,
    "plan b. The" (b loses its period, even if The begins the next caption), a curly apostrophe in mid-word.
    """
    for entity, character in ENTITIES.items():
        text = text.replace(entity, character)
    text, tokens, position = INVISIBLE.sub(" ", text), [], 0
    while position < len(text):
        if text[position].isspace():
            position += 1
            continue
        matches = [rule.match(text, position) for rule in PTB_RULES]
        match = max(filter(None, matches), key=lambda m: m.end())       # of equals the first
        position, token = match.end(1), match[1].lower()
        if re.fullmatch(f"{CLITIC}|{NOT}", token):
            token = token.replace("’", "'")                             # elsewhere (o’clock) it stays curly
        if not PTB_DROPPED.fullmatch(token):
            token = PTB_REWRITTEN.get(token, token)
            tokens.append(token.replace("(", "-lrb-").replace(")", "-rrb-").replace(" ", "\u00a0"))
    return tokens
