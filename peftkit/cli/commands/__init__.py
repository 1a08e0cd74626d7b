"""The commands, one file each: its arguments (`COMMAND`), and `run`, which calls the API and prints.

A new command is a file here and its name below; the order is that of `peftkit --help`.
"""

from types import ModuleType

from peftkit.cli.commands import (
    check,
    convert,
    diagnose,
    env,
    eval,
    export,
    finetune,
    generate,
    inspect,
    merge,
    plan,
    recipes,
    reproduce,
    resume,
    schema,
    verify,
)

MODULES: tuple[ModuleType, ...] = (
    finetune,
    plan,
    check,
    inspect,
    convert,
    resume,
    diagnose,
    verify,
    reproduce,
    generate,
    eval,
    merge,
    export,
    recipes,
    schema,
    env,
)
