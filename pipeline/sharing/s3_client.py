"""A connection to a server that speaks S3, and its errors in words.

Botocore itself, in the caller's threads: an event loop that hands bytes to threads (s3fs) moved
two thirds of what boto3 does, and hashes would wait for it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from patchbank.pipeline.errors import NotInStore, StoreError
from patchbank.pipeline.sharing.stores import safe_url
from patchbank.pipeline.sharing.wire import CONNECT_S, MOST_ANSWER_BYTES, SILENT_S

CREDENTIALS = (
    "credentials are looked for in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, in the profile "
    "AWS_PROFILE of ~/.aws/credentials and ~/.aws/config, and in the role of the machine; "
    "AWS_ENDPOINT_URL names another server than Amazon's"
)
MISSING = "s3:// needs botocore: pip install 'patchbank[s3]'"
BUSY = {"SlowDown", "RequestTimeout", "RequestTimeTooSkewed", "Throttling", "OperationAborted"}
ALTERED = {"BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}
NOT_LET_IN = {"ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "UnsupportedAlgorithm"}
CONNECTIONS = 32


class Exists(StoreError):
    """A file that was to be made is there."""


def connect() -> Any:
    """A client of botocore; without credentials it asks as anybody may.

    Raises `StoreError` where botocore is missing or the configuration is broken.
    """
    try:
        from botocore import UNSIGNED
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
        from botocore.session import Session
    except ImportError as error:
        raise StoreError(MISSING) from error
    try:
        session = Session()
        session.register_component("data_loader", _loader())
        config = Config(
            connect_timeout=CONNECT_S,
            read_timeout=SILENT_S,
            max_pool_connections=CONNECTIONS,
            retries={"total_max_attempts": 1},
            # Each file's own SHA-256 goes with it instead, and its MD5 is compared afterwards.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"payload_signing_enabled": False},
            **({} if session.get_credentials() else {"signature_version": UNSIGNED}),
        )
        client = session.create_client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        raise StoreError(f"s3: {error}; {CREDENTIALS}") from error
    _bound_answers(client)
    return client


@cache
def _loader() -> Any:
    """What botocore knows of S3: parsing it takes longer than all else that a client needs."""
    from botocore.loaders import create_loader

    return create_loader()


def _bound_answers(client: Any) -> None:
    """Lets no answer but a file take more than `MOST_ANSWER_BYTES`: botocore reads them whole."""
    from botocore.awsrequest import AWSResponse
    from botocore.exceptions import HTTPClientError

    http = client._endpoint.http_session
    send = http.send

    def bounded(request: Any) -> Any:
        is_file, request.stream_output = request.stream_output, True
        answer = send(request)
        if is_file and answer.status_code < 300:
            return answer
        content = io.BytesIO()
        for piece in answer.raw.stream(2**16):
            content.write(piece)
            if content.tell() > MOST_ANSWER_BYTES:
                answer.raw.close()
                raise HTTPClientError(error=f"more than {MOST_ANSWER_BYTES} bytes of an answer")
        return AWSResponse(answer.url, answer.status_code, answer.headers, _Read(content))

    http.send = bounded


class _Read:
    """An answer that has come, as botocore takes it."""

    def __init__(self, content: io.BytesIO) -> None:
        self._content = content

    def stream(self) -> Iterator[bytes]:
        yield self._content.getvalue()


@contextmanager
def asking(url: str, name: str, bucket: str) -> Iterator[None]:
    """Turns what botocore raises into `StoreError` and `NotInStore`."""
    from botocore.exceptions import BotoCoreError, ClientError
    from urllib3.exceptions import HTTPError

    where = f"{url}/{name}" if name else url
    try:
        yield
    except ClientError as error:
        raise _refusal(error.response, where, bucket) from error
    except (BotoCoreError, HTTPError, OSError) as error:
        raise _failure(error, where) from error


def _refusal(answer: dict[str, Any], where: str, bucket: str) -> StoreError:
    from patchbank.pipeline.bank.damage import shown

    told = answer.get("Error", {})
    code, said = str(told.get("Code", "")), str(told.get("Message", ""))
    status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code == "NoSuchBucket":
        return StoreError(f"{where}: there is no bucket {bucket}; make it or correct the address")
    if status == 404:
        return NotInStore(f"there is no {where}")
    if status == 412 or code == "PreconditionFailed":
        return Exists(f"{where} is there already")
    if status == 416:
        return StoreError(f"{where} is shorter than expected", may_pass=True)
    if code in ALTERED:
        return StoreError(f"{where}: the server got other bytes than were sent", may_pass=True)
    reason = shown(f"{code} {said}".strip())
    if status in (401, 403) or code in NOT_LET_IN:
        return StoreError(f"{where}: access refused ({reason}); {CREDENTIALS}")
    if status in (301, 307, 400) and "region" in said.lower():
        return StoreError(f"{where}: {reason}; set AWS_REGION to the region of the bucket")
    may_pass = status >= 500 or status in (408, 409, 429) or code in BUSY
    return StoreError(f"{where}: the server answered {status} {reason}", may_pass=may_pass)


def _failure(error: Exception, where: str) -> StoreError:
    """What went wrong on the way; a `StoreError` that a file on its way raised is itself."""
    from botocore import exceptions

    inner = getattr(error, "kwargs", {}).get("error")
    for cause in (inner, error.__context__, error.__cause__):
        if isinstance(cause, StoreError):
            return cause
    if isinstance(error, exceptions.EndpointConnectionError):
        server = safe_url(str(error.kwargs.get("endpoint_url", "")))
        return StoreError(
            f"{where}: the server at {server.split('/')[2]} cannot be reached; AWS_ENDPOINT_URL "
            "names another than Amazon's",
            may_pass=True,
        )
    if isinstance(error, exceptions.ConnectTimeoutError | exceptions.ReadTimeoutError):
        return StoreError(f"{where}: the server said nothing for too long", may_pass=True)
    lasting = (
        exceptions.ParamValidationError,
        exceptions.SSLError,
        exceptions.NoCredentialsError,
        exceptions.PartialCredentialsError,
        exceptions.CredentialRetrievalError,
        exceptions.TokenRetrievalError,
        exceptions.UnauthorizedSSOTokenError,
        exceptions.InvalidRegionError,
    )
    if isinstance(error, lasting):
        return StoreError(f"{where}: {type(error).__name__}: {error}"[:500] + f"; {CREDENTIALS}")
    return StoreError(
        f"{where}: the connection broke ({type(inner or error).__name__})", may_pass=True
    )
