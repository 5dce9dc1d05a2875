"""Which language a text is in, by py3langid."""

import functools

# oasst1's languages: a guess among these is better than one among all that py3langid knows.
LANGUAGES = ["ar", "bg", "bn", "ca", "cs", "da", "de", "el", "en", "eo", "es", "eu", "fa", "fi", "fr", "gl", "he", "hu", "id",
             "it", "ja", "ko", "nl", "no", "pl", "pt", "ro", "ru", "sk", "sv", "th", "tr", "uk", "vi", "zh"]  # fmt: skip


def language_code(name: str) -> str:
    """oasst1's code as py3langid has it: pt-BR is pt, uk-UA is uk, and Bokmål (nb) is Norwegian."""
    return name.split("-")[0].replace("nb", "no")


@functools.cache
def language_identifier():
    """py3langid, with probabilities, restricted to LANGUAGES."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(LANGUAGES)
    return identifier
