use serde_json::json;

use super::*;

const CHALLENGE: &str = "c2hhbGwgd2UgcGxheSBhIGdhbWU/IHllcywgbGV0IHVz";
const AUTHORIZATION: &str = "AWS4-HMAC-SHA256 Credential=AKID/20270115/us-east-1/sts/aws4_request, \
    SignedHeaders=accept;content-length;content-type;host;x-amz-date;x-teleport-challenge, Signature=ab";

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn headers() -> Vec<(&'static str, String)> {
    vec![
        ("Host", "sts.us-east-1.amazonaws.com".to_owned()),
        ("Accept", "application/json".to_owned()),
        ("Authorization", AUTHORIZATION.to_owned()),
        ("Content-Length", "43".to_owned()),
        (
            "Content-Type",
            "application/x-www-form-urlencoded".to_owned(),
        ),
        ("X-Amz-Date", "20270115T080000Z".to_owned()),
        ("X-Teleport-Challenge", CHALLENGE.to_owned()),
        ("X-Unsigned", "not passed on".to_owned()),
    ]
}

fn write(line: &str, headers: &[(&str, String)], body: &str) -> Vec<u8> {
    let headers: Vec<String> = headers
        .iter()
        .map(|(name, value)| format!("{name}: {value}\r\n"))
        .collect();
    format!("{line}\r\n{}\r\n{body}", headers.concat()).into_bytes()
}

fn with(name: &'static str, value: &str) -> Vec<u8> {
    let mut headers = headers();
    headers.retain(|(known, _)| *known != name);
    headers.push((name, value.to_owned()));
    write("POST / HTTP/1.1", &headers, BODY)
}

fn without(name: &str) -> Vec<u8> {
    let mut headers = headers();
    headers.retain(|(known, _)| *known != name);
    write("POST / HTTP/1.1", &headers, BODY)
}

fn parse(bytes: &[u8]) -> Result<StsRequest, IamError> {
    StsRequest::parse(bytes, CHALLENGE, now())
}

#[test]
fn an_honest_request_is_rebuilt_from_the_allow_list() {
    let request = parse(&write("POST / HTTP/1.1", &headers(), BODY)).unwrap();
    assert_eq!(request.host, "sts.us-east-1.amazonaws.com");
    let names: Vec<&str> = request
        .headers
        .iter()
        .map(|(name, _)| name.as_str())
        .collect();
    assert_eq!(
        names,
        [
            "accept",
            "authorization",
            "content-type",
            "x-amz-date",
            "x-teleport-challenge"
        ]
    );
    assert!(!format!("{request:?}").contains("Signature"));
}

#[test]
#[expect(clippy::too_many_lines, reason = "one table")]
fn hostile_requests_are_refused() {
    use IamError as E;
    let malformed = E::Malformed;
    let authorization = |text: &str| with("Authorization", text);
    let unsigned = AUTHORIZATION.replace(";x-teleport-challenge", "");
    let extra = AUTHORIZATION.replace("SignedHeaders=", "SignedHeaders=x-evil;");
    let line = |line: &str| write(line, &headers(), BODY);
    let repeated = |name: &'static str, value: &str| {
        let mut headers = headers();
        headers.push((name, value.to_owned()));
        write("POST / HTTP/1.1", &headers, BODY)
    };
    let many: Vec<(&str, String)> = headers()
        .into_iter()
        .chain((0..64).map(|_| ("X-Many", String::new())))
        .collect();
    let host = |host: &str| E::Host(host.to_owned());
    let twice = malformed("a header that matters is repeated");
    let reads = malformed("a header changes how the request is read");
    let cases = [
        (b"".to_vec(), malformed("its head does not end")),
        (
            b"POST / HTTP/1.1\r\n".to_vec(),
            malformed("its head does not end"),
        ),
        (vec![b'a'; MAX_REQUEST + 1], malformed("it is too long")),
        (b"\xff\r\n\r\n".to_vec(), malformed("its head is not ASCII")),
        (line("POST /"), malformed("its first line")),
        (line("POST / HTTP/1.0"), malformed("it is not HTTP/1.1")),
        (line("POST  / HTTP/1.1"), malformed("its first line")),
        (line("GET / HTTP/1.1"), E::Method("GET".to_owned())),
        (line("POST /x HTTP/1.1"), E::Target("/x".to_owned())),
        (
            line("POST https://evil.example/ HTTP/1.1"),
            E::Target("https://evil.example/".to_owned()),
        ),
        (
            line("POST /?Action=x HTTP/1.1"),
            E::Target("/?Action=x".to_owned()),
        ),
        (without("Host"), host("")),
        (with("Host", "evil.example"), host("evil.example")),
        (
            with("Host", "sts.us-east-1.amazonaws.com:443"),
            host("sts.us-east-1.amazonaws.com:443"),
        ),
        (
            with("Host", "STS.us-east-1.amazonaws.com"),
            host("STS.us-east-1.amazonaws.com"),
        ),
        (
            with("Host", "sts.us-east-1.amazonaws.com.evil.example"),
            host("sts.us-east-1.amazonaws.com.evil.example"),
        ),
        (
            with("Host", "sts.evil.amazonaws.com"),
            host("sts.evil.amazonaws.com"),
        ),
        (
            with("Host", "evil.sts.us-east-1.amazonaws.com"),
            host("evil.sts.us-east-1.amazonaws.com"),
        ),
        (repeated("HOST", "sts.amazonaws.com"), twice.clone()),
        (repeated("x-teleport-challenge", CHALLENGE), twice.clone()),
        (repeated("Content-Length", "43"), twice.clone()),
        (repeated("accept", "text/xml"), twice),
        (repeated("Transfer-Encoding", "chunked"), reads.clone()),
        (repeated("Connection", "keep-alive, authorization"), reads),
        (without("X-Teleport-Challenge"), E::Challenge),
        (with("X-Teleport-Challenge", "another"), E::Challenge),
        (with("X-Teleport-Challenge", ""), E::Challenge),
        (authorization(&unsigned), E::Unsigned),
        (authorization(&extra), E::Header("x-evil".to_owned())),
        (
            without("Authorization"),
            E::Authorization("it is not AWS4-HMAC-SHA256"),
        ),
        (
            authorization("AWS4-HMAC-SHA256 a"),
            E::Authorization("a part is not name=value"),
        ),
        (
            authorization("AWS4-HMAC-SHA256 Credential=a/b/c/d/e, Signature=x"),
            E::Authorization("it has not three parts"),
        ),
        (
            authorization(&format!("{AUTHORIZATION}, More=x")),
            E::Authorization("it has not three parts"),
        ),
        (
            authorization(&AUTHORIZATION.replace("/sts", "")),
            E::Authorization("the Credential has not five parts"),
        ),
        (
            authorization(&AUTHORIZATION.replace("Signature=ab", "Signature=")),
            E::Authorization("no Signature"),
        ),
        (
            authorization(&AUTHORIZATION.replace("Signature=ab", "Signature=a=b")),
            E::Authorization("a part is not name=value"),
        ),
        (without("Content-Length"), E::Body),
        (with("Content-Length", "44"), E::Body),
        (
            write("POST / HTTP/1.1", &headers(), "Action=GetSessionToken"),
            E::Body,
        ),
        (
            write("POST / HTTP/1.1", &headers(), &format!("{BODY}POST")),
            E::Body,
        ),
        (
            write("POST / HTTP/1.1", &many, BODY),
            malformed("too many headers"),
        ),
        (with("X-Folded", "a\r\n b: c"), malformed("a header's name")),
        (with("X-Null", "a\0b"), malformed("a header's value")),
        (
            with("X-Bare", "a\nHost: evil"),
            malformed("a header's value"),
        ),
        (with("X Space", "a"), malformed("a header's name")),
        (
            with("X-Amz-Date", "20270115T074459Z"),
            E::Skew {
                date: "20270115T074459Z".to_owned(),
            },
        ),
        (
            with("X-Amz-Date", "20270115T081501Z"),
            E::Skew {
                date: "20270115T081501Z".to_owned(),
            },
        ),
        (
            with("X-Amz-Date", "yesterday"),
            E::Skew {
                date: "yesterday".to_owned(),
            },
        ),
        (
            without("X-Amz-Date"),
            E::Skew {
                date: String::new(),
            },
        ),
    ];
    for (bytes, error) in cases {
        let text = String::from_utf8_lossy(&bytes)
            .chars()
            .take(600)
            .collect::<String>();
        assert_eq!(parse(&bytes), Err(error), "{text}");
    }
    for cut in 0..headers().len() {
        let whole = write("POST / HTTP/1.1", &headers(), BODY);
        assert!(parse(&whole[..whole.len() - 1 - cut]).is_err());
    }
}

#[test]
fn dates_within_fifteen_minutes_pass() {
    for date in ["20270115T074500Z", "20270115T081500Z"] {
        assert!(parse(&with("X-Amz-Date", date)).is_ok(), "{date}");
    }
}

#[test]
fn every_aws_host_is_known_and_no_other() {
    for host in [
        "sts.amazonaws.com",
        "sts.eu-central-1.amazonaws.com",
        "sts.us-gov-west-1.amazonaws.com",
        "sts-fips.us-west-2.amazonaws.com",
        "sts.cn-north-1.amazonaws.com.cn",
    ] {
        assert!(is_sts_host(host), "{host}");
    }
    for host in [
        "",
        "sts.",
        "sts..amazonaws.com",
        "sts.amazonaws.com.",
        "sts-fips.eu-central-1.amazonaws.com",
        "sts.cn-north-1.amazonaws.com",
        "sts.us-east-1.amazonaws.com.cn",
        "s3.us-east-1.amazonaws.com",
        "sts.us-east-1.amazonaws.com/",
    ] {
        assert!(!is_sts_host(host), "{host}");
    }
}

#[test]
fn answers_are_read_as_json_or_xml() {
    let identity = AwsIdentity {
        account: "123456789012".to_owned(),
        arn: "arn:aws:sts::123456789012:assumed-role/r/i-1".to_owned(),
    };
    let json = json!({"GetCallerIdentityResponse": {"GetCallerIdentityResult": {
        "Account": identity.account, "Arn": identity.arn, "UserId": "u"
    }, "ResponseMetadata": {}}})
    .to_string();
    let xml = format!(
        r#"<?xml version="1.0"?>
<GetCallerIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><GetCallerIdentityResult>
<Arn>{}</Arn><UserId>u</UserId><Account>{}</Account></GetCallerIdentityResult></GetCallerIdentityResponse>"#,
        identity.arn, identity.account
    );
    for text in [json, xml.trim().to_owned()] {
        assert_eq!(
            AwsIdentity::read("200 OK", true, text.as_bytes()).unwrap(),
            identity
        );
    }
    for (body, error) in [
        ("", IamError::Answer),
        ("{}", IamError::Empty),
        ("<a/>", IamError::Empty),
        ("<a", IamError::Answer),
        (
            r#"<!DOCTYPE a [<!ENTITY x "y">]><a>&x;</a>"#,
            IamError::Answer,
        ),
        (
            r#"{"GetCallerIdentityResponse":{"GetCallerIdentityResult":{"Account":"","Arn":"x"}}}"#,
            IamError::Empty,
        ),
    ] {
        assert_eq!(
            AwsIdentity::read("200 OK", true, body.as_bytes()),
            Err(error),
            "{body}"
        );
    }
    let refused = AwsIdentity::read("403 Forbidden", false, b"<Error>\nno\x1b[1m</Error>");
    assert_eq!(
        refused.unwrap_err().to_string(),
        r#"aws sts api returned status: "403 Forbidden" body: "<Error>no[1m</Error>""#
    );
}

#[test]
fn rules_match_in_every_key_they_have() {
    let identity = AwsIdentity {
        account: "111111111111".to_owned(),
        arn: "arn:aws:sts::111111111111:assumed-role/teleport-bot-role/i-0abc".to_owned(),
    };
    let cases = [
        (json!([]), false),
        (json!(null), false),
        (json!([{}]), false),
        (json!([{"aws_account": "111111111111"}]), true),
        (json!([{"aws_account": "222222222222"}]), false),
        (json!([{"aws_account": "11111111111*"}]), false),
        (
            json!([{"aws_account": "222222222222"}, {"aws_arn": "arn:aws:sts::1*"}]),
            true,
        ),
        (
            json!([{"aws_account": "222222222222", "aws_arn": "arn:aws:sts::1*"}]),
            false,
        ),
        (
            json!([{"aws_account": "111111111111",
                "aws_arn": "arn:aws:sts::111111111111:assumed-role/teleport-bot-role/i-*"}]),
            true,
        ),
        (
            json!([{"aws_account": "111111111111", "aws_regions": ["x"]}]),
            false,
        ),
        (
            json!([{"aws_account": "111111111111", "aws_organization_id": "o"}]),
            false,
        ),
    ];
    for (allow, passes) in cases {
        assert_eq!(identity.check(&allow).is_ok(), passes, "{allow}");
    }
    assert_eq!(
        identity.check(&json!([])).unwrap_err().to_string(),
        "instance arn:aws:sts::111111111111:assumed-role/teleport-bot-role/i-0abc did not match any \
         allow rules"
    );
}
