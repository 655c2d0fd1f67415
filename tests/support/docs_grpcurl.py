"""Makes the calls of the documentation's grpcurl commands, without the program grpcurl.

It supports what the docs use: `grpcurl (-plaintext | -cacert FILE [-cert FILE -key FILE]) [-H 'name: value']
[-rpc-header 'name: value'] [-d JSON] [-max-time seconds] address method`, and `list`. The docs use the default
addresses; the calls go to the servers under test.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pool, json_format, message_factory
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from personae.v1 import (
    audit_pb2,
    authentication_pb2,
    credential_pb2,
    factor_pb2,
    session_pb2,
    signing_key_pb2,
    user_pb2,
)
from service.rpc.envoy import ext_authz_pb2
from tests.support.leak_detector import Interceptor
from tests.support.waiting import PATIENCE

ADDRESS = "127.0.0.1:50051"
MTLS_ADDRESS = "127.0.0.1:50052"
DESCRIBED = (
    *(audit_pb2, authentication_pb2, credential_pb2, factor_pb2, session_pb2, signing_key_pb2, user_pb2),
    *(health_pb2, error_details_pb2, ext_authz_pb2),
)
"""Imported so that the descriptor pool has the services and the error details."""


@dataclass(frozen=True)
class Answer:
    """The output of a command: messages or lines, or an error as grpcurl prints it."""

    messages: list[Any] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    code: str = ""
    text: str = ""
    details: list[Any] = field(default_factory=list)


@dataclass
class Servers:
    """The servers under test that the addresses in the docs stand for."""

    plaintext: grpc.Channel | None = None
    """A server without TLS, at ADDRESS."""
    tls: dict[str, str] = field(default_factory=dict)
    """The address under test of a server with TLS, by its address in the docs."""
    directory: Path = Path()
    """The directory of the files that commands name."""


@dataclass
class Command:
    """A parsed command line of grpcurl."""

    address: str = ""
    is_plaintext: bool = False
    ca: str = ""
    certificate: str = ""
    private_key: str = ""
    method: str = ""
    """`package.Service/Method`, or "" for `list`."""
    service: str = ""
    """The service whose methods are listed; "" for all services."""
    data: str = "{}"
    metadata: list[tuple[str, str]] = field(default_factory=list)
    timeout: float = PATIENCE


def parse(words: list[str]) -> Command:
    """Parse the words of a command line. Raises ValueError for options that the docs do not use."""
    command = Command()
    arguments = _options(iter(words), command)
    match arguments:
        case [address, "list"]:
            command.address = address
        case [address, "list", service]:
            command.address, command.service = address, service
        case [address, method] if "/" in method:
            command.address, command.method = address, method
        case _:
            raise ValueError(f"expected `{ADDRESS} list` or `{ADDRESS} package.Service/Method`, found {arguments}")
    if command.address not in {ADDRESS, MTLS_ADDRESS}:
        raise ValueError(f"the docs call {ADDRESS} and {MTLS_ADDRESS}, not {command.address}")
    if command.is_plaintext == bool(command.ca):
        raise ValueError("the docs say either -plaintext or -cacert: grpcurl trusts no CA of ours by itself")
    return command


_FLAGS = {"-plaintext": "is_plaintext"}
_TEXTS = {"-cacert": "ca", "-cert": "certificate", "-key": "private_key", "-d": "data"}


def _options(words: Iterator[str], command: Command) -> list[str]:
    arguments: list[str] = []
    for word in words:
        match word:
            case "grpcurl":
                pass
            case flag if flag in _FLAGS:
                setattr(command, _FLAGS[flag], True)
            case option if option in _TEXTS:
                setattr(command, _TEXTS[option], next(words))
            case "-max-time":
                float(next(words))  # checked only: a busy machine needs longer
            case "-H" | "-rpc-header":
                name, _, value = next(words).partition(":")
                command.metadata.append((name.strip(), value.strip()))
            case option if option.startswith("-"):
                raise ValueError(f"the docs do not use {option}; teach tests/support/docs_grpcurl.py if they should")
            case argument:
                arguments.append(argument)
    return arguments


def run(command: Command, servers: Servers) -> Answer:
    """Make the call on a real server."""
    with _connected(command, servers) as channel:
        try:
            return _called(command, channel)
        except grpc.RpcError as error:
            is_shut_out = not command.is_plaintext and error.code() is grpc.StatusCode.UNAVAILABLE
            if is_shut_out and rpc_status.from_call(error) is None:
                return Answer(lines=[f'Failed to dial target host "{command.address}": EOF'])
            return _failed(error)


@contextlib.contextmanager
def _connected(command: Command, servers: Servers) -> Iterator[grpc.Channel]:
    """A channel to the server under test. With TLS a new connection for each command, as with grpcurl."""
    if command.is_plaintext:
        assert servers.plaintext is not None
        yield servers.plaintext
        return
    files = [command.ca, command.private_key, command.certificate]
    credentials = grpc.ssl_channel_credentials(
        *((servers.directory / name).read_bytes() if name else None for name in files)
    )
    alone = (("grpc.use_local_subchannel_pool", 1),)
    with grpc.secure_channel(servers.tls[command.address], credentials, alone) as channel:
        yield grpc.intercept_channel(channel, Interceptor())


def _called(command: Command, channel: grpc.Channel) -> Answer:
    if not command.method:
        return Answer(lines=_listed(command, channel))
    service_name, _, method_name = command.method.partition("/")
    method = descriptor_pool.Default().FindServiceByName(service_name).methods_by_name[method_name]
    request = json_format.ParseDict(
        _plain(json.loads(command.data)), message_factory.GetMessageClass(method.input_type)()
    )
    make: Any = channel.unary_stream if method.server_streaming else channel.unary_unary
    call = make(
        f"/{command.method}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
    )
    response = call(request, timeout=command.timeout, metadata=tuple(command.metadata))
    return Answer(messages=[_as_json(one) for one in (response if method.server_streaming else [response])])


def printed(text: str) -> Answer:
    """Parse the output of grpcurl; a line `…` stands for fields that the docs leave out."""
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
    """As grpcurl prints it: names as in the proto, without fields that have their default value."""
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def _plain(value: Any) -> Any:
    """Convert grpcurl's JSON to protobuf's: a field mask is an object in the first, a camel-case text in the second."""
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


def _listed(command: Command, channel: grpc.Channel) -> list[str]:
    if command.service:
        methods = descriptor_pool.Default().FindServiceByName(command.service).methods
        return sorted(f"{command.service}.{method.name}" for method in methods)
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    answers = stub.ServerReflectionInfo(requests, timeout=command.timeout, metadata=tuple(command.metadata))
    return sorted(one.name for answer in answers for one in answer.list_services_response.service)
