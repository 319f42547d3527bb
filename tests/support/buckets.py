"""A Google Cloud Storage server on this machine, with one bucket.

It is gcp-storage-emulator. TensorStore also needs requests that hold for one generation of a file only, and several
requests at a time. gcsfs moves files. The emulator has none of these, so they are added here.
"""

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from typing import Any

import pytest
from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets, objects
from gcp_storage_emulator.storage import Storage

BUCKET = "bucket"
_lock = threading.Lock()


def _with_conditions(handler: Callable[..., None]) -> Callable[..., None]:
    """Returns a handler that checks the conditions of a request, and names the generation of the file."""

    def handle(request: Any, response: Any, storage: Storage, *rest: Any) -> None:
        name = request.params.get("object_id") or request.query.get("name", [None])[0]
        try:
            generation = storage.get_file_obj(request.params["bucket_name"], name)["generation"]
        except NotFound:
            generation = "0"
        if request.query.get("ifGenerationMatch", [generation])[0] != generation:
            response.status = HTTPStatus.PRECONDITION_FAILED
        elif request.query.get("ifGenerationNotMatch", [None])[0] == generation:
            response.status = HTTPStatus.NOT_MODIFIED
        else:
            response["x-goog-generation"] = generation
            handler(request, response, storage, *rest)

    return handle


def _one_at_a_time(handler: Callable[..., None]) -> Callable[..., None]:
    """Returns a handler that waits for others. The emulator is not made for several threads."""

    def handle(*arguments: Any) -> None:
        with _lock:
            handler(*arguments)

    return handle


def _move(request: Any, response: Any, storage: Storage, *rest: Any) -> None:
    request.params["dest_bucket_name"] = request.params["bucket_name"]
    objects.rewrite(request, response, storage, *rest)
    if response.status == HTTPStatus.OK:  # gcsfs also tries to move folders, which are no files
        storage.delete_file(request.params["bucket_name"], request.params["object_id"])


CONDITIONAL: dict[Any, Any] = {
    handler: _with_conditions(handler) for handler in (objects.get, objects.delete, objects.insert)
}
MOVE = r"^/storage/v1/b/(?P<bucket_name>[^/]+)/o/(?P<object_id>.+)/moveTo/o/(?P<dest_object_id>.+)$"
ROUTES = tuple(
    (path, {method: _one_at_a_time(CONDITIONAL.get(handler, handler)) for method, handler in methods.items()})
    for path, methods in ((MOVE, {"POST": _move}), *server.HANDLERS)
)


class _Handler(server.RequestHandler):
    protocol_version = "HTTP/1.1"  # clients keep their connections


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # TensorStore opens many connections at once

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints nothing. A client may be gone."""


@contextlib.contextmanager
def serve_bucket() -> Iterator[None]:
    """Runs the server. All clients of this process and of its child processes use it."""
    storage = Storage(use_memory_fs=True)
    buckets.create_bucket(BUCKET, storage)
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "HANDLERS", ROUTES)
        httpd = _Server(("localhost", 0), functools.partial(_Handler, storage))
        url = f"http://localhost:{httpd.server_port}"
        for variable in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):  # of gcsfs and of TensorStore
            patch.setenv(variable, url)
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield
        httpd.shutdown()
        httpd.server_close()
