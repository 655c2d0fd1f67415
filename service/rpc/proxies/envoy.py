"""Envoy's Authorization service: Check, for its ext_authz filter."""

from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus

import grpc

from service.rpc.envoy import ext_authz_pb2 as pb
from service.rpc.envoy import ext_authz_pb2_grpc
from service.rpc.proxies.checks import SESSION_HEADER, USER_HEADER, CheckAnswer, CheckRequest, Checks

_OVERWRITE = pb.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
_OK = pb.Status()
_DENIED = pb.Status(code=grpc.StatusCode.PERMISSION_DENIED.value[0])
_METADATA = {USER_HEADER: "user_id", SESSION_HEADER: "session_id"}


@dataclass(eq=False)
class AuthorizationServicer(ext_authz_pb2_grpc.AuthorizationServicer):
    checks: Checks

    def Check(self, request: pb.CheckRequest, context: grpc.ServicerContext) -> pb.CheckResponse:
        return _response(self.checks.decide(_asked(request.attributes)))


def _asked(attributes: pb.AttributeContext) -> CheckRequest:
    http, extensions = attributes.request.http, attributes.context_extensions
    if http.header_map.headers:
        authorization = _joined(http.header_map, "authorization", ",")
        cookies = _joined(http.header_map, "cookie", "; ")
    else:
        authorization, cookies = http.headers.get("authorization"), http.headers.get("cookie")
    return CheckRequest(authorization, cookies or "", tuple(extensions.items()))


def _joined(headers: pb.HeaderMap, name: str, separator: str) -> str | None:
    """All values of a header, as Envoy joins them where it sends them as text; None without one."""
    values = [
        one.raw_value.decode(errors="replace") if one.raw_value else one.value
        for one in headers.headers
        if one.key.lower() == name
    ]
    return separator.join(values) if values else None


def _response(answer: CheckAnswer) -> pb.CheckResponse:
    if answer.status is not HTTPStatus.OK:
        denied = pb.DeniedHttpResponse(status=pb.HttpStatus(code=answer.status), headers=_options(answer.headers))
        return pb.CheckResponse(status=_DENIED, denied_response=denied)
    response = pb.CheckResponse(
        status=_OK,
        ok_response=pb.OkHttpResponse(headers=_options(answer.headers), headers_to_remove=answer.removed),
    )
    for name, value in answer.headers:
        if name in _METADATA:
            response.dynamic_metadata.fields[_METADATA[name]].string_value = value
    return response


def _options(headers: Iterable[tuple[str, str]]) -> list[pb.HeaderValueOption]:
    """Each replaces what the client has sent under its name."""
    return [
        pb.HeaderValueOption(header=pb.HeaderValue(key=name, value=value), append_action=_OVERWRITE)
        for name, value in headers
    ]
