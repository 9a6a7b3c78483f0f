"""``kage flows``: which flows the detectors have found, live or in a capture. Prints; decides nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kagemusha.cli.rule_changes import ConfigOption, JsonOption, RuleBase, VmOption
from kagemusha.errors import ConfigError, PeerError

if TYPE_CHECKING:
    from kagemusha.model.flow_policy import FlowsTable
    from kagemusha.model.rules import VmAddresses

app = typer.Typer(
    help="Flows: what the detectors have found in the VM's traffic, and for how long it holds.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command("list")
def list_flows(vm: VmOption = None, config: ConfigOption = None, json_output: JsonOption = False) -> None:
    """Show the flows that have a rule now, why, how long they last, and how much the VM has sent of them."""
    rules = RuleBase.find(vm, config)
    answer = rules.ask({"op": "list"})
    if not answer["ok"]:
        raise PeerError(str(answer["error"]["message"]), operation="list flows")
    counted = rules.ask({"op": "counters"}) if rules.live else {}
    frames = {each["rule"]: each["frames"] for each in counted.get("counters", ())}
    flows = [_flow(each, frames) for each in answer["rules"] if each["author"].startswith("detector:")]
    if json_output:
        print(json.dumps({"vm": rules.vm, "live": rules.live, "version": answer["version"], "flows": flows}, indent=2))
        return
    print(f"{rules.vm}: {len(flows)} flows{'' if rules.live else ' (no worker: as they were last)'}")
    for each in flows:
        sent = "" if each["frames"] is None else f"  {each['frames']} frames"
        print(f"{each['name']}  {each['class']} ({each['action']})  {each['left_s']:.0f} s left{sent}")
        print(f"    {each['why']}\n    {each['match']}")


def _flow(rule: dict[str, Any], frames: dict[str, int]) -> dict[str, Any]:
    left_s = 0.0 if rule["lapses_us"] is None else max(0.0, rule["lapses_us"] / 1e6 - time.time())
    return {
        "name": rule["name"],
        "match": rule["match"],
        "class": rule["class"],
        "action": rule["action"],
        "ttl_s": rule["ttl_s"],
        "left_s": round(left_s, 1),
        "why": rule["comment"],
        "frames": frames.get(rule["name"]),
    }


@app.command()
def explain(
    capture: Annotated[Path, typer.Argument(help="Capture of the VM's frames (pcap or pcapng).", metavar="CAPTURE")],
    vm_ip: Annotated[
        list[str] | None,
        typer.Option("--vm-ip", help="An IPv4 or IPv6 address of the VM; repeat for each.", metavar="ADDRESS"),
    ] = None,
    detector: Annotated[
        list[str] | None, typer.Option("--detector", help="sip, rtp, dns, tcp; repeat for each; default: all.")
    ] = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Say what the detectors would have found in a capture, at which frame, and whether it could have had a rule."""
    table, addresses = _wanted(vm_ip or [], detector or [], config)
    for each in _found(capture, table, addresses):
        print(json.dumps(each) if json_output else _line(each))


def _wanted(vm_ip: list[str], detectors: list[str], config: Path | None) -> tuple[FlowsTable, VmAddresses]:
    from pydantic import ValidationError

    from kagemusha.model.config import load
    from kagemusha.model.flow_policy import FlowsTable
    from kagemusha.model.rules import VmAddresses

    table = FlowsTable()
    if config is not None:
        loaded = load(config, role=None)
        table, vm_ip = loaded.flows, [*loaded.rules.vm_ips, *vm_ip]
    if not vm_ip:
        raise ConfigError(
            "the VM's addresses are not known", hint="give --vm-ip ADDRESS, or --config with rules.vm_ips"
        )
    try:
        names = tuple(detectors or table.detectors or ("sip", "rtp", "dns", "tcp"))
        table = FlowsTable.model_validate({**table.model_dump(), "detectors": names})
    except ValidationError as error:
        raise ConfigError(f"--detector: {detectors[0]!r} is none", hint="sip, rtp, dns, tcp") from error
    return table, VmAddresses.parse((), vm_ip)


def _found(capture: Path, table: FlowsTable, addresses: VmAddresses) -> Iterator[dict[str, Any]]:
    from kagemusha.gate.flows.replay import replay
    from kagemusha.gate.rules.libpcap import read_capture
    from kagemusha.model.flows import FlowInformation

    for frame, event, refusal in replay(read_capture(capture), table, addresses):
        row = {"number": frame.number, "time_s": round(frame.timestamp_s, 6), "name": event.name, "why": event.why}
        if isinstance(event, FlowInformation):
            yield row | {
                "event": "flow",
                "flow": str(event.address),
                "class": event.class_name,
                "ttl_s": event.ttl_s,
                "refused": refusal,
            }
        else:
            yield row | {"event": "end"}


def _line(each: dict[str, Any]) -> str:
    if each["event"] == "end":
        return f"{each['number']:7} end   {each['name']}: {each['why']}"
    refused = "" if each["refused"] is None else f"; no rule that transmits: {each['refused']}"
    return f"{each['number']:7} flow  {each['name']}: {each['flow']}, {each['why']}{refused}"
