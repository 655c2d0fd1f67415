"""grpcurl for the documentation: makes the call that a command line describes, without the program.

Knows what the docs use of it: `grpcurl -plaintext [-d JSON] [-rpc-header 'name: value'] [-max-time seconds] address
method`, and `list`. The address in the docs is that of `make run`; the call goes to the server under test.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import descriptor_pool, json_format, message_factory
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from personae.v1 import audit_pb2, authentication_pb2, credential_pb2, user_pb2

ADDRESS = "127.0.0.1:50051"
DESCRIBED = (audit_pb2, authentication_pb2, credential_pb2, user_pb2, health_pb2, error_details_pb2)
"""Imported for what they put into the descriptor pool: the services, and the details of errors."""


@dataclass(frozen=True)
class Answer:
    """What a command brings: messages or lines, or an error as grpcurl prints one."""

    messages: list[Any] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    code: str = ""
    text: str = ""
    details: list[Any] = field(default_factory=list)


@dataclass
class Command:
    """A command line of grpcurl, taken apart."""

    method: str = ""
    """`package.Service/Method`, or "" for `list`."""
    service: str = ""
    """The service whose methods are listed; "" for all services."""
    data: str = "{}"
    metadata: list[tuple[str, str]] = field(default_factory=list)
    timeout: float = 10


def parse(words: list[str]) -> Command:
    """Read the words of a command line as the shell hands them over. Raises ValueError for what the docs do not use."""
    command = Command()
    arguments = _options(iter(words), command)
    match arguments:
        case [found, "list"] if found == ADDRESS:
            pass
        case [found, "list", service] if found == ADDRESS:
            command.service = service
        case [found, method] if found == ADDRESS and "/" in method:
            command.method = method
        case _:
            raise ValueError(f"expected `{ADDRESS} list` or `{ADDRESS} package.Service/Method`, found {arguments}")
    return command


def _options(words: Iterator[str], command: Command) -> list[str]:
    arguments: list[str] = []
    for word in words:
        match word:
            case "grpcurl" | "-plaintext":
                pass
            case "-d":
                command.data = next(words)
            case "-max-time":
                command.timeout = float(next(words))
            case "-rpc-header":
                name, _, value = next(words).partition(":")
                command.metadata.append((name.strip(), value.strip()))
            case option if option.startswith("-"):
                raise ValueError(f"the docs do not use {option}; teach tests/support/docs_grpcurl.py if they should")
            case argument:
                arguments.append(argument)
    return arguments


def run(command: Command, channel: grpc.Channel) -> Answer:
    """Make the call on a real server."""
    if not command.method:
        return Answer(lines=_listed(command.service, channel))
    service_name, _, method_name = command.method.partition("/")
    method = descriptor_pool.Default().FindServiceByName(service_name).methods_by_name[method_name]
    request = json_format.ParseDict(
        _plain(json.loads(command.data)), message_factory.GetMessageClass(method.input_type)()
    )
    call: Any = channel.unary_unary(
        f"/{command.method}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
    )
    try:
        response = call(request, timeout=command.timeout, metadata=tuple(command.metadata))
    except grpc.RpcError as error:
        return _failed(error)
    return Answer(messages=[_as_json(response)])


def printed(text: str) -> Answer:
    """Read what grpcurl prints; a line that is `…` stands for what the docs leave out."""
    if not text.startswith("ERROR:"):
        return Answer(messages=_documents(text)) if text.startswith("{") else Answer(lines=text.splitlines())
    found = re.fullmatch(r"ERROR:\n  Code: (\w+)\n  Message: ([^\n]*)\n(?:  Details:\n(.*))?", text + "\n", re.DOTALL)
    if found is None:
        raise ValueError(f"this is not how grpcurl prints an error:\n{text}")
    code, message, details = found.groups()
    numbered = re.split(r"^\s*\d+\)\s*", details or "", flags=re.MULTILINE)
    return Answer(code=code, text=message, details=[one for part in numbered for one in _documents(part)])


def _failed(error: Any) -> Answer:
    code = "".join(word.capitalize() for word in error.code().name.split("_"))
    status = rpc_status.from_call(error)
    details = [] if status is None else [_as_json(detail) for detail in status.details]
    return Answer(code=code, text=error.details(), details=details)


def _as_json(message: Any) -> Any:
    """As grpcurl shows it: names as in the proto, and no fields that have their default."""
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def _plain(value: Any) -> Any:
    """What grpcurl reads, as protobuf's own JSON: a field mask is an object there, and a text in camel case here."""
    if isinstance(value, dict):
        if value.keys() == {"paths"}:
            return ",".join(re.sub(r"_([a-z])", lambda found: found[1].upper(), path) for path in value["paths"])
        return {key: _plain(inner) for key, inner in value.items()}
    return value


def _documents(text: str) -> list[Any]:
    """The JSON documents in a text."""
    text = re.sub(r"^(\s*)…$(?=\s*[}\]])", r'\1"…": 0', text, flags=re.MULTILINE)
    text = re.sub(r"^(\s*)…$", r'\1"…": 0,', text, flags=re.MULTILINE).strip()
    decoder = json.JSONDecoder()
    found: list[Any] = []
    while text:
        document, end = decoder.raw_decode(text)
        found.append(document)
        text = text[end:].strip()
    return found


def _listed(service: str, channel: grpc.Channel) -> list[str]:
    if service:
        methods = descriptor_pool.Default().FindServiceByName(service).methods
        return sorted(f"{service}.{method.name}" for method in methods)
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    answers = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=10)
    return sorted(one.name for answer in answers for one in answer.list_services_response.service)
