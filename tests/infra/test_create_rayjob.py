"""The program that creates RayJobs where KubeRay does not do it by itself, against an API server of twenty lines."""

import importlib.util
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.infra.manifests import KUBERAY, documents, ray_job_spec, validate

PROGRAM = KUBERAY / "base" / "retrain-cron" / "create_rayjob.py"


class Api:
    """Answers as Kubernetes does, and remembers what was asked and created."""

    def __init__(self, jobs, refuse=False):
        (self.cron,) = documents(KUBERAY / "base" / "retrain" / "raycronjob.yaml")
        self.cron["metadata"]["uid"] = "0b9c"
        self.jobs, self.created, self.requests, self.refuse = jobs, [], [], refuse

    def answer(self, method, path, body):
        self.requests.append((method, path))
        if method == "POST":
            if self.refuse:
                return 422, {"message": "spec is invalid"}
            self.created.append(body)
            return 201, body
        if "/raycronjobs/" in path:
            return 200, self.cron
        return 200, {"items": self.jobs}


@pytest.fixture
def program(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("create_rayjob", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "namespace").write_text("crossenc\n")
    (tmp_path / "token").write_text("secret")
    monkeypatch.setattr(module, "ACCOUNT", tmp_path)
    return module


@pytest.fixture
def serve(monkeypatch):
    servers = []

    def start(api):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                assert self.headers["Authorization"] == "Bearer secret"
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                status, answer = api.answer(self.command, self.path, body)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

            do_POST = do_GET

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("KUBERNETES_API", f"http://127.0.0.1:{server.server_port}")
        return api

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def job(name, status):
    return {"metadata": {"name": name}, "status": {"jobDeploymentStatus": status} if status else {}}


def test_it_creates_the_ray_job_of_the_template_with_an_owner_and_the_label_of_kuberay(program, serve, capsys):
    api = serve(Api([job("last-week", "Complete"), job("before", "Failed")]))
    program.main("crossenc-retrain")
    (created,) = api.created
    assert created["spec"] == ray_job_spec(api.cron)
    assert created["metadata"]["labels"]["ray.io/cronjob-name"] == "crossenc-retrain"
    assert created["metadata"]["ownerReferences"] == [
        {"apiVersion": "ray.io/v1", "kind": "RayCronJob", "name": "crossenc-retrain", "uid": "0b9c"}
    ]
    prefix = "/apis/ray.io/v1/namespaces/crossenc/"
    assert [path.removeprefix(prefix) for _, path in api.requests] == [
        "raycronjobs/crossenc-retrain",
        "rayjobs?labelSelector=ray.io/cronjob-name%3Dcrossenc-retrain",
        "rayjobs",
    ]
    assert "created crossenc-retrain-" in capsys.readouterr().out
    del created["metadata"]["ownerReferences"]  # not in a manifest that people write
    validate(created)


@pytest.mark.parametrize("status", ["Initializing", "Running", "Retrying", "Suspended", None])
def test_it_creates_nothing_while_the_last_one_is_unfinished(program, serve, capsys, status):
    api = serve(Api([job("done", "Complete"), job("crossenc-retrain-7", status)]))
    program.main("crossenc-retrain")
    assert api.created == []
    assert capsys.readouterr().out == "crossenc-retrain-7 is unfinished: nothing is created\n"


def test_one_minute_gives_one_name_as_kuberay_itself_would_give(program):
    (cron,) = documents(KUBERAY / "base" / "retrain" / "raycronjob.yaml")
    cron["metadata"]["uid"] = "0b9c"
    name = program.rayjob(cron, 29_395_000)["metadata"]["name"]
    assert name == "crossenc-retrain-29395000" and len(name) <= 47


def test_it_says_why_kubernetes_refuses(program, serve):
    serve(Api([], refuse=True))
    with pytest.raises(SystemExit, match=r"422.*spec is invalid"):
        program.main("crossenc-retrain")
