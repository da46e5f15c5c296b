"""English names of languages by their ISO 639 codes, for lists to choose from."""

from __future__ import annotations

__all__ = ["language_name"]

_TABLE = """
af=Afrikaans am=Amharic ar=Arabic az=Azerbaijani be=Belarusian bg=Bulgarian bn=Bengali bs=Bosnian ca=Catalan
cs=Czech cy=Welsh da=Danish de=German el=Greek en=English eo=Esperanto es=Spanish et=Estonian eu=Basque
fa=Persian fi=Finnish fr=French ga=Irish gl=Galician gu=Gujarati ha=Hausa he=Hebrew hi=Hindi hr=Croatian
hu=Hungarian hy=Armenian id=Indonesian ig=Igbo is=Icelandic it=Italian ja=Japanese ka=Georgian kk=Kazakh
km=Khmer kn=Kannada ko=Korean ky=Kyrgyz lb=Luxembourgish lo=Lao lt=Lithuanian lv=Latvian mg=Malagasy
mk=Macedonian ml=Malayalam mn=Mongolian mr=Marathi ms=Malay mt=Maltese my=Burmese nb=Norwegian ne=Nepali
nl=Dutch no=Norwegian pa=Punjabi pl=Polish ps=Pashto pt=Portuguese ro=Romanian ru=Russian si=Sinhala
sk=Slovak sl=Slovenian so=Somali sq=Albanian sr=Serbian sv=Swedish sw=Swahili ta=Tamil te=Telugu tg=Tajik
th=Thai tl=Tagalog tr=Turkish uk=Ukrainian ur=Urdu uz=Uzbek vi=Vietnamese xh=Xhosa yi=Yiddish yo=Yoruba
zh=Chinese zu=Zulu
"""
_NAMES = dict(entry.split("=") for entry in _TABLE.split())


def language_name(code: str) -> str:
    """The name of a language, such as "German" of "de" and "Chinese (Hans)" of "zh-Hans"; the code if it is unknown."""
    if code in _NAMES:
        return _NAMES[code]
    language, mark, rest = code.replace("_", "-").partition("-")
    return f"{_NAMES[language]} ({rest})" if mark and language in _NAMES else code
