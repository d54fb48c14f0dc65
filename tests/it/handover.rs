//! A restart of the agent under a real systemd refuses no connection.

use crate::common::{
    Cluster, OutputText as _, RESOURCES, Sandbox, Systemd, eventually, repository, skip,
};

/// Connects all the time until `/root/stop` is there; each connection has to be greeted in the end. A
/// connection that the old process took up at its last moment may be cut off: that is no refusal, and
/// the client would try again.
const CLIENT: &str = r"
import os, socket, sys, time
refused = served = cut = 0
while not os.path.exists('/root/stop'):
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(30)
        try:
            s.connect(sys.argv[1])
        except OSError as error:
            refused += 1
            print('refused', error, flush=True)
            continue
        try:
            s.sendall(b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0')
            greeted = len(s.recv(9)) > 0
        except ConnectionError:
            greeted = False
        served += greeted
        cut += not greeted
    time.sleep(0.002)
print(f'served={served} refused={refused} cut={cut}')
";

/// Where the API listens in the one test and in the other.
const STORED: &str = "/run/tbot/workload.sock";
const PASSED: &str = "/opt/machine-id/w.sock";

struct Machine {
    systemd: Systemd,
    listen: &'static str,
}

impl Machine {
    fn new(sandbox: &Sandbox, cluster: &Cluster<'_>, listen: &'static str, unit: &str) -> Self {
        let systemd = Systemd::boot(sandbox);
        let token = cluster.invite("example", "5m");
        let storage = sandbox.path("bot");
        let config = cluster
            .config(&token, "bot")
            .replace(storage.to_str().unwrap(), "/root/bot");
        let service = format!(
            "services:\n- type: workload-identity-api\n  listen: unix://{listen}\n  selector: {{name: foo}}\n"
        );
        systemd.write("/root/tbot.yaml", &(config + &service));
        systemd.write("/root/client.py", CLIENT);
        systemd.write("/etc/systemd/system/tbot.service", unit);
        Self { systemd, listen }
    }

    fn shell(&self, line: &str) -> String {
        self.systemd.shell(line).success()
    }

    fn served(&self) {
        eventually("the Workload API serves", || {
            let path = format!("unix://{}", self.listen);
            let inspected = self
                .systemd
                .run(["tbot", "spiffe-inspect", "--path", &path]);
            let text = inspected.text();
            if text.contains("/svc/foo") {
                Ok(())
            } else {
                Err(text)
            }
        });
    }

    /// Restarts in every way while a client connects, and gives what the client saw.
    fn restarts(&self, ways: &[&str]) -> String {
        self.shell(&format!(
            "rm -f /root/stop; systemd-run --unit=client --property=StandardOutput=file:/root/seen \
             python3 /root/client.py {}",
            self.listen
        ));
        for way in ways {
            self.shell(way);
            self.shell("systemctl is-active --quiet tbot || sleep 1; systemctl start tbot");
            self.served();
        }
        self.shell(
            "touch /root/stop; while systemctl is-active --quiet client; do sleep 0.1; done; cat /root/seen",
        )
    }
}

/// What the unit needs of its own; the rest is the generated one's.
fn unit(sandbox: &Sandbox, listen: &str) -> String {
    let config = sandbox.write(
        "tbot.yaml",
        format!(
            "version: v2\nproxy_server: example.com:443\nonboarding: {{join_method: iam, token: x}}\n\
             storage: {{type: directory, path: /root/bot}}\nservices:\n- type: workload-identity-api\n  \
             listen: unix://{listen}\n  selector: {{name: foo}}\n"
        ),
    );
    let mut command = sandbox.tbot(["install", "systemd", "--user", "root", "--group", "root"]);
    command.arg("--config").arg(&config);
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("FileDescriptorStoreMax="), "{text}");
    text.lines()
        .map(|line| match line {
            line if line.starts_with("ExecStart=") => {
                "ExecStart=/usr/local/bin/tbot start -c /root/tbot.yaml"
            }
            "ProtectHome=read-only" => "ProtectHome=no",
            line => line,
        })
        .fold(String::new(), |text, line| text + line + "\n")
}

#[test]
fn the_descriptor_store_keeps_the_socket_over_a_restart_and_a_crash() {
    if let Some(why) = Systemd::unavailable() {
        return skip(&why);
    }
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let unit = unit(&sandbox, STORED);
    let machine = Machine::new(&sandbox, &cluster, STORED, &unit);
    machine.shell("systemctl daemon-reload; systemctl start tbot");
    machine.served();
    let file = machine.shell("stat -c %i /run/tbot/workload.sock");
    let seen = machine.restarts(&[
        "systemctl restart tbot",
        // As an upgrade does it.
        "cp /usr/local/bin/tbot /usr/local/bin/new; mv /usr/local/bin/new /usr/local/bin/tbot; \
         systemctl restart tbot",
        "systemctl kill --signal=KILL tbot",
    ]);
    assert!(seen.contains("refused=0 "), "{seen}");
    assert_eq!(machine.shell("stat -c %i /run/tbot/workload.sock"), file);
    // A stop ends the keeping: systemd removes the directory, and the next start binds anew.
    machine.shell("systemctl stop tbot; ! test -e /run/tbot/workload.sock; systemctl start tbot");
    machine.served();

    // Another mode counts for the socket that is kept too.
    machine.shell(
        "sed -i 's/selector:/socket: {mode: 0660}\\n  selector:/' /root/tbot.yaml; systemctl restart tbot; \
         test $(stat -c %a /run/tbot/workload.sock) = 660",
    );

    // A service that moves elsewhere leaves nothing behind.
    machine.shell(
        "sed -i s/workload.sock/other.sock/ /root/tbot.yaml; systemctl restart tbot; \
         ! test -e /run/tbot/workload.sock; test -S /run/tbot/other.sock",
    );
}

#[test]
fn who_was_barred_for_a_flood_when_the_agent_crashed_is_let_in() {
    if let Some(why) = Systemd::unavailable() {
        return skip(&why);
    }
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let unit = unit(&sandbox, STORED);
    let machine = Machine::new(&sandbox, &cluster, STORED, &unit);
    let flood = std::fs::read_to_string(repository().join("tests/support/flood.py")).unwrap();
    machine.systemd.write("/run/flood.py", &flood);
    machine.shell("systemctl daemon-reload; systemctl start tbot");
    machine.served();
    let list = "os.listxattr('/run/tbot/workload.sock')";
    let barred = format!("python3 -c \"import os; exit('system.posix_acl_access' not in {list})\"");
    let seen = machine.shell(&format!(
        "systemd-run -q --unit=flood --uid=65534 python3 /run/flood.py /run/tbot/workload.sock 60; \
         for try in $(seq 200); do \
           systemctl kill --signal=STOP tbot; if {barred}; then break; fi; systemctl kill --signal=CONT tbot; \
         done; \
         systemctl kill --signal=KILL tbot; if {barred}; then echo still barred; fi; \
         systemctl stop flood"
    ));
    assert_eq!(seen, "still barred\n", "nobody was barred when it crashed");
    machine.served();
    let seen = machine.shell(&format!(
        "if {barred}; then echo still barred; fi; stat -c %a /run/tbot/workload.sock"
    ));
    assert_eq!(seen, "777\n");
    machine.shell("setpriv --reuid=65534 --clear-groups tbot spiffe-inspect --path unix:///run/tbot/workload.sock");
    let journal = machine.shell("journalctl -u tbot --no-pager");
    assert!(
        journal.contains("A user floods the socket")
            && journal.contains("Letting users in whom an agent that ended had barred"),
        "{journal}"
    );
}

#[test]
fn a_socket_unit_s_socket_is_listened_on_and_left_alone() {
    if let Some(why) = Systemd::unavailable() {
        return skip(&why);
    }
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let unit = "[Service]\nType=notify\nExecStart=/usr/local/bin/tbot start -c /root/tbot.yaml\n\
                Restart=always\nRestartSec=1\n";
    let machine = Machine::new(&sandbox, &cluster, PASSED, unit);
    machine.systemd.write(
        "/etc/systemd/system/tbot.socket",
        "[Socket]\nListenStream=/opt/machine-id/w.sock\nSocketMode=0660\n",
    );
    // The first connection starts the agent.
    machine.shell("systemctl daemon-reload; systemctl start tbot.socket");
    machine.served();
    let seen = machine.restarts(&[
        "systemctl restart tbot",
        "systemctl kill --signal=KILL tbot",
    ]);
    assert!(seen.contains("refused=0 "), "{seen}");
    let mode = machine
        .shell("systemctl stop tbot.service 2> /dev/null; stat -c %a /opt/machine-id/w.sock");
    assert_eq!(mode, "660\n");
    let journal = machine.shell("journalctl -u tbot --no-pager");
    assert!(
        journal.contains("Listening on a socket that systemd passed"),
        "{journal}"
    );
}
