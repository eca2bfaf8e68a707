"""Shell completion, made from the tree of commands so that the two cannot disagree."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Final

from cloud_hub.cli.arguments import build
from cloud_hub.cli.exits import Exit

_SCRIPT: Final = """\
# Completion of `outrider` for bash: source <(outrider completion bash)
_outrider() {{
    local word path="outrider" step
    word="${{COMP_WORDS[COMP_CWORD]}}"
    declare -A words=(
{entries}
    )
    for step in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        if [[ -n "${{words["$path $step"]+known}}" ]]; then path="$path $step"; fi
    done
    COMPREPLY=($(compgen -W "${{words["$path"]}}" -- "$word"))
    if [[ ${{#COMPREPLY[@]}} -eq 0 && "$word" != -* ]]; then COMPREPLY=($(compgen -f -- "$word")); fi
}}
complete -o filenames -F _outrider outrider
"""


def run(arguments: argparse.Namespace) -> Exit:
    """Print the script."""
    del arguments  # bash is the only shell so far
    entries = "\n".join(f'        ["{path}"]="{" ".join(words)}"' for path, words in _words(build(), "outrider"))
    print(_SCRIPT.format(entries=entries), end="")
    return Exit.DONE


def _words(parser: argparse.ArgumentParser, path: str) -> Iterator[tuple[str, list[str]]]:
    words: list[str] = []
    for action in parser._actions:
        words += [option for option in action.option_strings if option.startswith("--")]
        if isinstance(action, argparse._SubParsersAction):
            for name, leaf in action.choices.items():
                words.append(name)
                yield from _words(leaf, f"{path} {name}")
        elif not action.option_strings and action.choices:
            words += [str(choice) for choice in action.choices]
    yield path, words
