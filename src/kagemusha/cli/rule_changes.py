"""``kage rules list|set|add|del|history|rollback``: a VM's rules, while it runs or not.

A running worker is asked over its control socket, and a change is in force when the command returns. Without one, the
same change is made in the rule base, by the same code, and comes into force at the next start; the output says so.
Prints and asks; decides nothing.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kagemusha.errors import ConfigError, TransientError

if TYPE_CHECKING:
    from kagemusha.gate.rulebase.version import RuleVersion
    from kagemusha.model.rule_policy import RulesTable

Answer = dict[str, Any]
EXIT_CODES = {"ChangeRefusedError": 2, "ConfigError": 2, "TransientError": 6, "PeerError": 6}
CHANGES = frozenset({"set", "add", "del", "rollback"})

VmOption = Annotated[str | None, typer.Option("--vm", help="Which VM, if there are several.", metavar="NAME")]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Configuration file: the VM's name and where its state is.", metavar="FILE"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
CommentOption = Annotated[str, typer.Option("--comment", help="For the history.", metavar="TEXT")]
BaseOption = Annotated[int | None, typer.Option("--base", help="Only if this version is in force.", metavar="N", min=1)]


def register(app: typer.Typer) -> None:
    """Add the commands to ``kage rules``."""
    app.command("list")(list_rules)
    app.command("set")(set_rules)
    app.command("add")(add_rule)
    app.command("del")(delete_rules)
    app.command()(history)
    app.command()(rollback)


def list_rules(
    vm: VmOption = None,
    config: ConfigOption = None,
    version: Annotated[int | None, typer.Option("--version", help="An older version.", metavar="N", min=1)] = None,
    toml: Annotated[bool, typer.Option("--toml", help="Print the host's part as a rule file.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Show a VM's rules, in the order in which they are tried, with what each has matched."""
    rules = RuleBase.find(vm, config)
    request = {"op": "list"} if version is None else {"op": "list", "version": version}
    answer = _accepted(rules.ask(request), json_output=json_output)
    counted = rules.ask({"op": "counters"}) if rules.live and version is None else {}
    answer["counters"] = counted.get("counters")
    if toml:
        print(answer["toml"], end="")
    elif json_output:
        print(json.dumps({"vm": rules.vm, "live": rules.live, **answer}, indent=2))
    else:
        _print_rules(rules, answer)


def set_rules(
    file: Annotated[Path | None, typer.Argument(help="Rule file (TOML).", metavar="FILE")] = None,
    profile: Annotated[str | None, typer.Option("--profile", help="A shipped profile.", metavar="NAME")] = None,
    only: Annotated[
        bool, typer.Option("--only", help="Remove the rules of guests and detectors, too; else they stay.")
    ] = False,
    vm: VmOption = None,
    config: ConfigOption = None,
    comment: CommentOption = "",
    base: BaseOption = None,
    json_output: JsonOption = False,
) -> None:
    """Replace a VM's rules by a file's or a profile's."""
    from kagemusha.gate.rules.language import read_text

    if (file is None) == (profile is None):
        raise ConfigError("give either FILE or --profile NAME", hint="'kage rules profiles' lists them")
    request: dict[str, Any] = {"op": "set", "only": only}
    if file is not None:
        request |= {
            "text": read_text(file),
            "comment": comment or f"set {file.name if file.name.isprintable() else ''}",
        }
    else:
        request |= {"profile": profile, "comment": comment}
    _change(RuleBase.find(vm, config), request, base, source=file, json_output=json_output)


def add_rule(
    name: Annotated[str, typer.Argument(help="Of the new rule.", metavar="NAME")],
    expression: Annotated[str, typer.Argument(help="pcap-filter expression.", metavar="EXPR")],
    class_name: Annotated[str, typer.Option("--class", help="Class of the frames it matches.", metavar="CLASS")],
    before: Annotated[str | None, typer.Option("--before", help="The rule to stand in front of.")] = None,
    last: Annotated[bool, typer.Option("--last", help="Behind all other rules of the host; the default.")] = False,
    ttl: Annotated[str | None, typer.Option("--ttl", help='When it lapses, like "30s", "5m" or "2h".')] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace the rule of this name, if there is one.")] = False,
    vm: VmOption = None,
    config: ConfigOption = None,
    comment: CommentOption = "",
    base: BaseOption = None,
    json_output: JsonOption = False,
) -> None:
    """Add a rule to a VM's rules."""
    if last and before is not None:
        raise ConfigError("--last contradicts --before", hint="give one of them")
    rule = {"name": name, "match": expression, "class": class_name, "ttl": ttl}
    request = {"op": "add", "rules": [rule], "before": before, "replace": replace, "comment": comment}
    _change(RuleBase.find(vm, config), request, base, json_output=json_output)


def delete_rules(
    names: Annotated[list[str], typer.Argument(help="Of the rules; a guest's, too.", metavar="NAME…")],
    vm: VmOption = None,
    config: ConfigOption = None,
    comment: CommentOption = "",
    base: BaseOption = None,
    json_output: JsonOption = False,
) -> None:
    """Delete rules from a VM's rules."""
    request = {"op": "del", "names": names, "comment": comment}
    _change(RuleBase.find(vm, config), request, base, json_output=json_output)


def history(
    limit: Annotated[int, typer.Option("-n", help="How many versions.", min=1, max=200)] = 20,
    vm: VmOption = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show who changed a VM's rules, newest first."""
    rules = RuleBase.find(vm, config)
    answer = _accepted(rules.ask({"op": "history", "limit": limit}), json_output=json_output)
    if json_output:
        print(json.dumps({"vm": rules.vm, "live": rules.live, **answer}, indent=2))
        return
    print(f"{'version':>7}  {'time':19}  {'author':20}  {'rules':>5}  comment")
    for each in answer["versions"]:
        when = _time(each["created_us"])
        print(f"{each['number']:7}  {when}  {each['author']:20}  {each['rules']:5}  {each['comment']}")


def rollback(
    number: Annotated[int, typer.Argument(help="The version whose rules to restore.", metavar="N", min=1)],
    vm: VmOption = None,
    config: ConfigOption = None,
    comment: CommentOption = "",
    base: BaseOption = None,
    json_output: JsonOption = False,
) -> None:
    """Put the rules of an old version into force again, as a new version."""
    request = {"op": "rollback", "number": number, "comment": comment}
    _change(RuleBase.find(vm, config), request, base, json_output=json_output)


@dataclass(frozen=True, slots=True)
class RuleBase:
    """Whom to ask about a VM's rules: its worker, or the database.

    :param table: ``[rules]``; None without a configuration file.
    """

    vm: str
    socket: Path
    state_dir: Path
    table: RulesTable | None
    mac: str | None
    live: bool

    @staticmethod
    def find(vm: str | None, config_file: Path | None) -> RuleBase:
        """:raise ConfigError: there is no such VM, or several."""
        from kagemusha.gate.rulebase.client import RulesClient
        from kagemusha.gate.rulebase.sockets import socket_path
        from kagemusha.model.config import Config, load

        table, mac = None, None
        state_dir, runtime_dir = (Config.model_fields[key].default for key in ("state_dir", "runtime_dir"))
        if config_file is not None:
            config = load(config_file, role=None)
            state_dir, runtime_dir, mac = config.state_dir, config.runtime_dir, config.network.mac
            table = config.rules
            if vm not in (None, config.vm.name):
                raise ConfigError(f"--vm {vm}: {config_file} is about {config.vm.name}", hint="leave one of them out")
            vm = config.vm.name
        name = vm or _only_vm(state_dir, runtime_dir)
        path = socket_path(runtime_dir, name)
        try:
            RulesClient(path).close()
            live = True
        except TransientError:
            live = False
        return RuleBase(name, path, state_dir, table, mac, live)

    def ask(self, request: dict[str, Any]) -> Answer:
        """The answer, from whoever keeps the rules."""
        from kagemusha.gate.rulebase.client import RulesClient
        from kagemusha.model.rules import NAME

        request = {key: value for key, value in request.items() if value is not None}
        user = os.environ.get("SUDO_USER", "")
        if NAME.fullmatch(user):
            request["by"] = user
        if not self.live:
            return self._ask_database(request)
        with RulesClient(self.socket) as client:
            return client.ask(request)

    def _ask_database(self, request: dict[str, Any]) -> Answer:
        """Do it here: the worker's code, with an installation that only tries whether it would be possible."""
        from kagemusha.gate.rulebase.authors import AuthorKind
        from kagemusha.gate.rulebase.configured import configured_rules
        from kagemusha.gate.rulebase.operations import Caller, Operations
        from kagemusha.gate.rulebase.requests import parse_request
        from kagemusha.gate.rulebase.rulebook import RuleBook
        from kagemusha.gate.rulebase.sockets import user_name
        from kagemusha.gate.rulebase.store import RuleStore
        from kagemusha.gate.rules.macros import SAMPLE_ADDRESSES
        from kagemusha.gate.rules.matcher import bind
        from kagemusha.model.rule_policy import GuestPolicy

        addresses = self.table.addresses(self.mac) if self.table and self.mac else SAMPLE_ADDRESSES

        def install(version: RuleVersion) -> None:
            bind(version.rule_set, addresses)

        changing = request["op"] in CHANGES
        with RuleStore(self.state_dir, self.vm, read_only=not changing) as store:
            policy = self.table.guest if self.table else GuestPolicy()
            book = RuleBook(store, install, policy=policy, addresses=addresses)
            if changing and self.table is not None:
                book.start(configured_rules(self.table))
            if store.in_force is None:
                raise ConfigError(
                    f"VM {self.vm} has no rules yet", hint="its first start makes them; a change needs --config before"
                )
            caller = Caller(AuthorKind.HOST, user_name(os.getuid()))
            operations = Operations(book, None, time.monotonic)
            return operations.answer(parse_request(json.dumps(request).encode()), caller)


def _only_vm(state_dir: Path, runtime_dir: Path) -> str:
    from kagemusha.gate.rulebase.sockets import SUFFIX
    from kagemusha.gate.rulebase.store import vms_in

    names = {path.name.removesuffix(SUFFIX) for path in runtime_dir.glob(f"*{SUFFIX}") if path.is_socket()}
    names |= set(vms_in(state_dir))
    if len(names) == 1:
        return names.pop()
    if not names:
        where = f"{runtime_dir} and {state_dir}"
        raise ConfigError(f"no VM has rules on this host (looked in {where})", hint="give --config")
    raise ConfigError(f"several VMs have rules on this host: {', '.join(sorted(names))}", hint="give --vm NAME")


# --- output -----------------------------------------------------------------------------------------------------------


def _change(
    rules: RuleBase, request: dict[str, Any], base: int | None, *, source: Path | None = None, json_output: bool
) -> None:
    answer = _accepted(rules.ask({**request, "base": base}), source=source, json_output=json_output)
    if json_output:
        print(json.dumps({"vm": rules.vm, "live": rules.live, **answer}, indent=2))
        return
    what = [f"{word} {', '.join(answer[word])}" for word in ("added", "removed") if answer[word]]
    if not answer["changed"]:
        print(f"{rules.vm}: nothing to change: version {answer['version']} has these rules")
        return
    where = "in force" if rules.live else "stored; no worker runs, so it comes into force when the VM is started"
    print(f"{rules.vm}: version {answer['version']} is {where}" + "".join(f"; {each}" for each in what))


def _accepted(answer: Answer, *, source: Path | None = None, json_output: bool) -> Answer:
    """The answer if it is ok; else its faults are printed, and the command ends."""
    if answer["ok"]:
        return answer
    if json_output:
        print(json.dumps(answer, indent=2))
    for fault in [] if json_output else answer["faults"]:
        place = [str(source)] if source is not None else ["kage"]
        place += [str(part) for part in (fault["rule"], fault["column"]) if part is not None]
        what = f"{fault['key']}: {fault['cause']}" if fault["key"] else fault["cause"]
        print(f"{':'.join(place)}: {what}" + (f" — {fault['remedy']}" if fault["remedy"] else ""), file=sys.stderr)
    raise typer.Exit(EXIT_CODES.get(answer["error"]["kind"], 1))


def _time(created_us: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(created_us / 1e6))


def _print_rules(rules: RuleBase, answer: Answer) -> None:
    state = "" if rules.live else " (no worker runs: it comes into force when the VM is started)"
    who = f"by {answer['author']}, {_time(answer['created_us'])}"
    print(f"{rules.vm}: version {answer['version']}{state}, {who}: {answer['comment']}")
    classes = ", ".join(f"{each['name']} ({each['action']})" for each in answer["classes"])
    print(f"classes: {classes}; default: {answer['default']}")
    counts = {each["rule"]: each for each in answer["counters"] or ()}
    print(f"{'frames':>10} {'bytes':>14}  {'action':8}  {'class':12}  {'author':16}  {'lapses':>8}  rule")
    actions = {each["name"]: each["action"] for each in answer["classes"]}
    last = {"name": None, "class": answer["default"], "action": actions[answer["default"]], "lapses_us": None}
    for each in [*answer["rules"], {**last, "author": "", "match": ""}]:
        count = counts.get(each["name"])
        frames, size = (count["frames"], count["bytes"]) if count else ("-", "-")
        left = "" if each["lapses_us"] is None else f"{max(0.0, each['lapses_us'] / 1e6 - time.time()):.0f} s"
        row = f"{frames:>10} {size:>14}  {each['action']:8}  {each['class']:12}  {each['author']:16}  {left:>8}"
        print(
            f"{row}  {each['name'] or '(default)'}" + (f": {' '.join(each['match'].split())}" if each["match"] else "")
        )
