"""Joining by ID tokens: issuers with the names of the real ones, and what each of their tokens says."""
import base64
import http.server
import json
import signal
import threading
import time

import jwt
from cluster import NAME, PROXY, run, wait
from cryptography.hazmat.primitives.asymmetric import rsa

AZURE = "0ca3ddd9-0000-0000-0000-000000000000"
# Method: issuer, audience, claims of a token that is let in, `spec` of the token resource.
CASES = {
    "github": (
        "https://token.actions.githubusercontent.com", "teleport.cluster.local",
        {"sub": "repo:octo/app:ref:refs/heads/main", "repository": "octo/app", "repository_owner": "octo",
         "workflow": "deploy", "environment": "prod", "actor": "mona", "ref": "refs/heads/main",
         "ref_type": "branch", "sha": "c0ffee", "run_id": "7", "event_name": "push", "enterprise": "octo-inc",
         "enterprise_id": "1"},
        {"github": {"allow": [{"repository": "octo/other"}, {"repository": "octo/app", "ref": "refs/heads/main"}]}}),
    "gitlab": (
        "https://gitlab.example.org", NAME,
        {"sub": "project_path:octo/app:ref_type:branch:ref:main", "namespace_path": "octo",
         "project_path": "octo/app", "namespace_id": "1", "project_id": "2", "user_login": "mona",
         "user_email": "m@example.org", "user_id": "3", "ref": "main", "ref_type": "branch",
         "ref_protected": "true", "pipeline_source": "push", "pipeline_id": "4", "environment": "prod",
         "environment_protected": "false", "runner_id": 5, "runner_environment": "self-hosted", "sha": "c0ffee",
         "ci_config_ref_uri": "gitlab.example.org/octo/app//.gitlab-ci.yml@refs/heads/main",
         "ci_config_sha": "beef", "deployment_tier": "production", "project_visibility": "private"},
        {"gitlab": {"domain": "gitlab.example.org", "allow": [{"project_path": "octo/*", "ref_type": "branch"}]}}),
    "circleci": (
        "https://oidc.circleci.com/org/octo-id", "octo-id",
        {"sub": "org/octo-id/project/app-id/user/mona", "oidc.circleci.com/project-id": "app-id",
         "oidc.circleci.com/context-ids": ["prod-id"]},
        {"circleci": {"organization_id": "octo-id", "allow": [{"project_id": "app-id", "context_id": "prod-id"}]}}),
    "bitbucket": (
        "https://api.bitbucket.org/2.0/workspaces/octo/pipelines-config/identity/oidc", "ari:cloud:octo",
        {"sub": "{repo}:{env}:{step}", "stepUuid": "{step}", "repositoryUuid": "{repo}", "pipelineUuid": "{pipe}",
         "workspaceUuid": "{space}", "deploymentEnvironmentUuid": "{env}", "branchName": "main"},
        {"bitbucket": {"audience": "ari:cloud:octo", "identity_provider_url":
                       "https://api.bitbucket.org/2.0/workspaces/octo/pipelines-config/identity/oidc",
                       "allow": [{"repository_uuid": "{repo}", "branch_name": "main"}]}}),
    "terraform_cloud": (
        "https://app.terraform.io", NAME,
        {"sub": "organization:octo:project:app:workspace:prod:run_phase:apply",
         "terraform_organization_id": "org-1", "terraform_organization_name": "octo",
         "terraform_project_id": "prj-1", "terraform_project_name": "app", "terraform_workspace_id": "ws-1",
         "terraform_workspace_name": "prod", "terraform_full_workspace": "octo/app/prod",
         "terraform_run_id": "run-1", "terraform_run_phase": "apply"},
        {"terraform_cloud": {"allow": [{"organization_name": "octo", "project_name": "app",
                                        "workspace_name": "prod"}]}}),
    "azure_devops": (
        f"https://vstoken.dev.azure.com/{AZURE}", "api://AzureADTokenExchange",
        {"sub": "p://octo/app/deploy", "org_id": AZURE, "prj_id": "prj-1", "def_id": "1", "rpo_id": "repo-1",
         "rpo_uri": "https://github.com/octo/app.git", "rpo_ver": "c0ffee", "rpo_ref": "refs/heads/main",
         "run_id": "7"},
        {"azure_devops": {"organization_id": AZURE, "allow": [{"project_name": "app",
                                                               "pipeline_name": "deploy"}]}}),
    "gcp": (
        "https://accounts.google.com", "teleport.cluster.local",
        {"sub": "1", "email": "bot@octo.iam.gserviceaccount.com", "google": {"compute_engine": {
            "project_id": "octo", "zone": "europe-west1-b", "instance_id": "9", "instance_name": "vm"}}},
        {"gcp": {"allow": [{"project_ids": ["octo"], "locations": ["europe-west1"],
                            "service_accounts": ["bot@octo.iam.gserviceaccount.com"]}]}}),
    "kubernetes": (
        "https://kubernetes.default.svc", NAME,
        {"sub": "system:serviceaccount:prod:bot", "kubernetes.io": {
            "namespace": "prod", "pod": {"name": "app-0", "uid": "p"}, "serviceaccount": {"name": "bot",
                                                                                          "uid": "s"}}},
        {"kubernetes": {"type": "static_jwks", "static_jwks": {"jwks": "KEYS"},
                        "allow": [{"service_account": "prod:bot"}]}}),
}
# What a refusal of other claims says, in 18.0.0.
NO_RULE = {"azure_devops": "id token claims failed to match any allow rules",
           "kubernetes": "kubernetes token did not match any allow rules"}
KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)


def hosts():
    """The names of the issuers, and of the metadata service that one of them has."""
    return {case[0].split("/")[2] for case in CASES.values()} | {"metadata.google.internal"}


def keys():
    public = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(KEY.public_key()))
    return {"keys": [dict(public, kid="trial", use="sig", alg="RS256")]}


def document(host, path):
    """What the issuer at `host` answers under `path`; None if it has nothing there."""
    if path == "/trial/jwks":
        return keys()
    suffix = "/.well-known/openid-configuration"
    if not path.endswith(suffix):
        return None
    return {"issuer": f"https://{host}{path.removesuffix(suffix)}", "jwks_uri": f"https://{host}/trial/jwks",
            "authorization_endpoint": f"https://{host}/a", "response_types_supported": ["id_token"],
            "subject_types_supported": ["public"], "id_token_signing_alg_values_supported": ["RS256"]}


def id_token(method, **changes):
    issuer, audience, claims, _spec = CASES[method]
    now = int(time.time())
    claims = dict(claims, iss=issuer, aud=audience, iat=now, nbf=now, exp=now + 600)
    claims.update(changes)
    return jwt.encode(claims, KEY, algorithm="RS256", headers={"kid": "trial"})


class Sources(http.server.BaseHTTPRequestHandler):
    """Where a GitHub or Azure DevOps job, or a machine of Google's, gets its token."""
    token = None

    def answer(self, value):
        data = value.encode()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.send_header("metadata-flavor", "Google")
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if self.path.startswith("/computeMetadata"):
            self.answer(Sources.token if "identity" in self.path else "1")
        else:
            self.answer(json.dumps({"value": Sources.token}))

    def do_POST(self):
        self.answer(json.dumps({"oidcToken": Sources.token}))

    def log_message(self, *_):
        pass


def environment(t, method, token):
    """What a job of the method's provider finds in its environment."""
    Sources.token = token
    if not hasattr(Sources, "server"):
        Sources.server = http.server.ThreadingHTTPServer(("127.0.0.1", 80), Sources)
        threading.Thread(target=Sources.server.serve_forever, daemon=True).start()
    (t.dir / "token.jwt").write_text(token)
    return {
        "github": {"ACTIONS_ID_TOKEN_REQUEST_URL": "http://127.0.0.1/github?x=1",
                   "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "bearer"},
        "gitlab": {"TBOT_GITLAB_JWT": token},
        "circleci": {"CIRCLE_OIDC_TOKEN": token},
        "bitbucket": {"BITBUCKET_STEP_OIDC_TOKEN": token},
        "terraform_cloud": {"TFC_WORKLOAD_IDENTITY_TOKEN": token},
        "azure_devops": {"SYSTEM_ACCESSTOKEN": "bearer", "SYSTEM_OIDCREQUESTURI": "http://127.0.0.1/azure"},
        "gcp": {"GCE_METADATA_HOST": "127.0.0.1"},
        "kubernetes": {"KUBERNETES_TOKEN_PATH": str(t.dir / "token.jwt")},
    }[method]


def joins(method, static=False):
    def step(t):
        issuer, audience, claims, spec = CASES[method]
        if static:
            spec = {method: dict(spec[method], static_jwks="KEYS")}
        text = json.dumps({"kind": "token", "version": "v2", "metadata": {"name": f"by-{method}"}, "spec": {
            "roles": ["Bot"], "bot_name": "example", "join_method": method, **spec}})
        t.cluster.create(text.replace('"KEYS"', json.dumps(json.dumps(keys()))))
        joined = {}
        for name, go in (("theirs", True), ("ours", False)):
            folder = f"{method}-{'keys-' * static}{name}"
            done = oneshot(t, method, folder, id_token(method), go)
            assert done.returncode == 0, f"{name}: {done.stderr[-1500:]}"
            certificate = t.dir / folder / "storage/tlscert"
            joined[name] = attributes(certificate)
            first = instance(certificate)
            assert first[1] == "1", first
            agent = t.agent(folder, go=go, extra=environment(t, method, id_token(method)))
            # The Go agent renews as it starts; ours when it is due, or told to.
            ready = lambda: "bot-example" in (t.dir / folder / "agent.log").read_text() or go
            wait("the agent", ready, 20)
            agent.send_signal(signal.SIGHUP) if not go else None
            wait(f"{name}, a renewal as the same instance", lambda: instance(certificate) == (first[0], "2"), 30)
            agent.terminate()
            agent.wait(30)
        assert joined["ours"] == joined["theirs"], joined
        wrong = {
            "another audience": id_token(method, aud="https://elsewhere.example"),
            "another issuer": id_token(method, iss="https://elsewhere.example"),
            "expired": id_token(method, exp=int(time.time()) - 60, iat=int(time.time()) - 660),
            "unsigned": unsigned(method),
        }
        if static or method == "kubernetes":
            # The token resource has the keys themselves: they say who issued it.
            del wrong["another issuer"]
        if method == "kubernetes":
            loose = {key: value for key, value in claims["kubernetes.io"].items() if key != "pod"}
            wrong["not bound to a pod"] = id_token(method, **{"kubernetes.io": loose})
        said = []
        for name, token in wrong.items():
            done = oneshot(t, method, f"{method}-refused", token, False)
            assert done.returncode == 1, f"{name}: {done.returncode} {done.stderr[-1500:]}"
            said.append(f"{name}: {done.stderr.strip().splitlines()[-1][:300]}")
        other = {key: "other" for key in claims if isinstance(claims[key], str)}
        if method == "gcp":
            other = {"email": "other", "google": {"compute_engine": {"project_id": "other", "zone": "other-b"}}}
        if method == "kubernetes":
            other = {"sub": "system:serviceaccount:dev:bot"}
        if method == "circleci":
            other = {"oidc.circleci.com/project-id": "other"}
        if method == "azure_devops":
            other = {"sub": "p://octo/other/other"}
        done = oneshot(t, method, f"{method}-refused", id_token(method, **other), False)
        expected = NO_RULE.get(method, "id token claims did not match any allow rules")
        assert done.returncode == 1 and expected in done.stderr, f"{done.returncode} {done.stderr[-1500:]}"
        return "\n".join([json.dumps(joined["ours"]), *said])

    step.__name__ = f"join_by_{method}" + "_with_keys" * static
    step.__doc__ = f"join by {method}: as the Go agent, and again as the same instance; five tokens that are refused"
    return step


def oneshot(t, method, name, token, go):
    config = t.config(name, f"proxy_server: {PROXY}", onboarding=f"{{join_method: {method}, token: by-{method}}}")
    env = dict(t.cluster.env, **environment(t, method, token))
    return run(t.binary(go), "start", "--oneshot", "-c", config, env=env, check=False)


def attributes(certificate):
    """The join attributes in a bot's certificate."""
    text = run("openssl", "x509", "-in", certificate, "-noout", "-subject", "-nameopt", "sep_multiline,utf8").stdout
    return json.loads(named(text, "1.3.9999.2.21"))


def instance(certificate):
    """The bot instance in a bot's certificate, and its generation; None of both while the Go agent writes it."""
    text = run("openssl", "x509", "-in", certificate, "-noout", "-subject", "-nameopt", "sep_multiline,utf8",
               check=False).stdout
    return named(text, "1.3.9999.2.20"), named(text, "1.3.9999.1.14")


def named(text, oid):
    return next((line.split("=", 1)[1] for line in text.splitlines() if line.strip().startswith(f"{oid}=")), None)


def unsigned(method):
    header, payload, _signature = id_token(method).split(".")
    none = base64.urlsafe_b64encode(b'{"alg":"none","typ":"JWT"}').rstrip(b"=").decode()
    return f"{none}.{payload}."


def join_by_bound_keypair(t):
    """join by bound_keypair with keys of each agent's `keypair create`; a join after the identity is gone; a copy"""
    joined = {}
    for name, go in (("theirs", True), ("ours", False)):
        folder = t.dir / f"bound-{name}"
        (folder / "storage").mkdir(parents=True)
        made = run(t.binary(go), "keypair", "create", f"--proxy-server={PROXY}", f"--storage=file://{folder}/storage",
                   "--format=json", env=t.cluster.env).stdout
        t.cluster.create(json.dumps({"kind": "token", "version": "v2", "metadata": {"name": f"bound-{name}"}, "spec": {
            "roles": ["Bot"], "bot_name": "example", "join_method": "bound_keypair", "bound_keypair": {
                "onboarding": {"initial_public_key": json.loads(made)["public_key"]},
                "recovery": {"limit": 2, "mode": "standard"}}}}))
        onboarding = f"{{join_method: bound_keypair, token: bound-{name}}}"

        def start():
            # 18.0.0 fails now and then on its own record of the token, and says to try again.
            for _attempt in range(5):
                done = t.oneshot(f"bound-{name}", f"proxy_server: {PROXY}", go=go, onboarding=onboarding, check=False)
                if "cannot be patched" not in done.stderr:
                    return done
            return done

        done = start()
        assert done.returncode == 0, f"{name}: {done.stderr[-1500:]}"
        joined[name] = [dict(attributes(folder / "storage/tlscert"), meta=None)]
        saved = folder / "saved"
        run("cp", "-a", folder / "storage", saved)
        for gone in [path for path in (folder / "storage").iterdir() if not path.name.startswith(("id_bkp", "bkp_"))]:
            gone.unlink()
        done = start()
        assert done.returncode == 0, f"{name}, again: {done.stderr[-1500:]}"
        joined[name].append(sorted(path.name for path in (folder / "storage").iterdir() if "bkp" in path.name))
        # The state of before, as a copy of the machine would have it.
        run("cp", saved / "bkp_state", folder / "storage/bkp_state")
        for gone in [path for path in (folder / "storage").iterdir() if not path.name.startswith(("id_bkp", "bkp_"))]:
            gone.unlink()
        done = start()
        assert done.returncode == 1, f"{name}, a copy: {done.returncode}"
        joined[name].append(done.stderr.strip().splitlines()[-1][:200])
    return json.dumps(joined)


STEPS = [*(joins(method) for method in CASES), joins("github", True), joins("gitlab", True), join_by_bound_keypair]
