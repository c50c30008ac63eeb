"""The command line: `moma VERB [overrides ...]`, overrides in Hydra's syntax.

    moma --help                     the verbs                 exit status   0  done
    moma VERB --help                its groups and defaults                 1  a sweep with a job that is not finished
    moma VERB a=1 group=option      runs it                                 2  a mistake, named in one line
    moma VERB -m a=1,2 group=x,y    every combination                     130  interrupted; run again to go on
    moma compare RUN RUN out=F      = runs=[RUN,RUN]

`-m` is for train, upcycle and evaluate: see moma/sweep.py. What a verb refuses (ValueError, OSError, a package that is
not installed) is one line on stderr; `--traceback` shows where it comes from. torch is not imported here.
"""

import os
import sys
from collections.abc import Sequence

from omegaconf import OmegaConf

from moma import __version__
from moma.config import TWO_SEEDS, VERBS, compose, locate, options, quoted, raw
from moma.schema import nearest

LISTS = {"compare": "runs"}  # verb -> the key of its arguments that are not key=value
MULTIRUN = ("-m", "--multirun")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command (default: this process's arguments); returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = [argument for argument in arguments if argument.startswith("-")]
    verb, *overrides = [argument for argument in arguments if argument not in flags] or [""]
    traceback = "--traceback" in flags
    try:
        if "--version" in flags:
            print(f"moma {__version__}")
            return 0
        if not verb:
            print(_verbs())
            return 0 if {"-h", "--help"} & set(flags) else 2
        if verb not in VERBS:
            hint = nearest(verb, VERBS) or ": see moma --help"
            raise ValueError(f"got the verb {verb!r}, need one of {', '.join(VERBS)}{hint}")
        for flag in flags:
            _check(flag)
        if {"-h", "--help"} & set(flags):
            print(_help(verb, overrides), flush=True)
            return 0
        overrides = _listed(verb, overrides)
        if set(MULTIRUN) & set(flags):
            return locate("moma.sweep:sweep")(verb, overrides)
        composed = compose(verb, overrides)
        result = locate(VERBS[verb].entry)(composed if VERBS[verb].composed else composed.config)
        return result if VERBS[verb].composed and result else 0
    except BrokenPipeError:  # the reader of our output has gone, as in `moma train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if traceback:
            raise
        message = str(error)
        if isinstance(error, ModuleNotFoundError):
            message = f"got no package {error.name!r}, need it here: run make install, or pip install it"
        print(f"moma {verb}: {message}" if verb in VERBS else f"moma: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if traceback:
            raise
        print("interrupted; run the same command to go on", file=sys.stderr)
        return 130


def _check(flag: str) -> None:
    if flag not in ("-h", "--help", "--traceback", *MULTIRUN):
        raise ValueError(f"got the flag {flag}, need --help, --traceback or -m: settings are written key=value")


def _listed(verb: str, overrides: list[str]) -> list[str]:
    """The arguments that are no overrides, gathered under the verb's key for them."""
    bare = [override for override in overrides if "=" not in override and not override.startswith("~")]
    if not bare or verb not in LISTS:
        return overrides
    rest = [override for override in overrides if override not in bare]
    return [*rest, f"{LISTS[verb]}=[{','.join(map(quoted, bare))}]"]


def _verbs() -> str:
    rows = [f"  {verb:<11} {entry.phrase}" for verb, entry in VERBS.items()]
    usage = "usage: moma VERB [key=value ...] [group=option ...] [--traceback]"
    more = "       moma VERB -m key=a,b group=x,y    a run for every combination (train, upcycle, evaluate)"
    return "\n".join([usage, more, "", *rows, "", "moma VERB --help shows the groups and defaults of a verb."])


def _help(verb: str, overrides: list[str]) -> str:
    mapping, choices = raw(verb, overrides, complete=False)
    if verb in TWO_SEEDS:
        choices = {"experiment": "", **choices}  # none is chosen by default
    lines = [f"moma {verb}: {VERBS[verb].phrase}", ""]
    if choices:
        width = max(map(len, choices))
        lines += ["groups (group=option; * is chosen):"]
        for group, choice in sorted(choices.items()):
            marked = (f"{option}*" if option == choice else option for option in options(group, verb))
            lines.append(f"  {group:<{width}}  {' '.join(marked)}")
        lines.append("")
    return "\n".join([*lines, "settings (key.key=value):", OmegaConf.to_yaml(OmegaConf.create(mapping)).rstrip()])


if __name__ == "__main__":
    sys.exit(main())
