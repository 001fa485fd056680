"""Writes docs/settings.md from the settings' own fields.   usage: make_settings_table.py [--check]

With --check nothing is written; exits with 1 where the file is not what would be written.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pelton.cli.settings import Setting, all_settings

TARGET = Path(__file__).parent.parent / "docs" / "settings.md"

HEAD = """# Settings

Made by `scripts/make_settings_table.py` from the fields of each room's `config.py`; do not edit.

Each setting is a flag of `pelton serve` (and, but for those of the server, of `pelton generate`), an environment
variable, and a key of the YAML file that `--config` or `PELTON_CONFIG` names: `--max-num-seqs 16`,
`PELTON_MAX_NUM_SEQS=16`, `max_num_seqs: 16`. A flag wins over the environment, the environment over the file.
A switch has a second flag that turns it off: `--no-enable-overlap`. Lists are given as several words to a flag, with
commas in a variable, as a list in the file.
"""


def make_page() -> str:
    rooms: dict[str, list[Setting]] = {}
    for setting in all_settings().values():
        rooms.setdefault(setting.room, []).append(setting)
    parts = [HEAD]
    for room, settings in rooms.items():
        parts.append(f"\n## {room.title()}\n\n| flag | variable | default | what it does |\n|---|---|---|---|\n")
        parts += [_row(setting) for setting in settings]
    return "".join(parts)


def _row(setting: Setting) -> str:
    flags = ", ".join(f"`{flag}`" for flag in (setting.flag, *setting.aliases))
    default = "" if setting.default in (None, ()) else f"`{str(setting.default).lower()}`"
    if isinstance(setting.default, str):
        default = f"`{setting.default}`"
    choices = f" ({', '.join(f'`{choice}`' for choice in setting.choices)})" if setting.choices else ""
    return f"| {flags} | `{setting.env_name}` | {default} | {setting.help}{choices} |\n"


def main() -> int:
    page = make_page()
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(page, encoding="utf-8")
        return 0
    if TARGET.exists() and TARGET.read_text(encoding="utf-8") == page:
        print(f"docs/{TARGET.name} is current")
        return 0
    print(f"docs/{TARGET.name} is not current; run scripts/make_settings_table.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
