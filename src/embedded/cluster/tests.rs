use super::*;

#[test]
fn public_addresses_get_a_port_and_become_names_of_the_certificate() {
    let bound: SocketAddr = "127.0.0.1:3080".parse().unwrap();
    let given = [
        "a.example:443",
        "b.example",
        "::1",
        "[::1]:1",
        "https://c.example/",
        "10.0.0.1",
    ];
    let addrs = public_addrs(&given.map(str::to_owned), bound);
    assert_eq!(
        addrs,
        [
            "a.example:443",
            "b.example:3080",
            "[::1]:3080",
            "[::1]:1",
            "c.example:3080",
            "10.0.0.1:3080"
        ]
    );
    assert_eq!(
        hosts(&addrs),
        [
            "a.example",
            "b.example",
            "::1",
            "c.example",
            "10.0.0.1",
            "localhost",
            "127.0.0.1"
        ]
    );
    assert_eq!(public_addrs(&[], bound), ["127.0.0.1:3080"]);
    let all: SocketAddr = "0.0.0.0:3080".parse().unwrap();
    assert!(!public_addrs(&[], all)[0].contains("0.0.0.0"));
}
