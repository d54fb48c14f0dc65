"""Makes a role in moto, opens a session of it, and has every later signature verified.

usage: aws_identity.py MOTO_URL ROLE SESSION
prints: access key, secret key, session token
"""
import json
import sys
import urllib.request

import boto3

url, role, session = sys.argv[1:]
access = {"region_name": "us-east-1", "endpoint_url": url, "aws_access_key_id": "a", "aws_secret_access_key": "b"}


def policy(**statement):
    return json.dumps({"Version": "2012-10-17", "Statement": [{"Effect": "Allow", **statement}]})


iam = boto3.client("iam", **access)
trust = policy(Principal={"Service": "ec2.amazonaws.com"}, Action="sts:AssumeRole")
arn = iam.create_role(RoleName=role, AssumeRolePolicyDocument=trust)["Role"]["Arn"]
iam.put_role_policy(
    RoleName=role,
    PolicyName="identity",
    PolicyDocument=policy(Action=["sts:GetCallerIdentity", "eks:*"], Resource="*"),
)
opened = boto3.client("sts", **access).assume_role(RoleArn=arn, RoleSessionName=session)["Credentials"]
urllib.request.urlopen(
    urllib.request.Request(f"{url}/moto-api/reset-auth", data=b"0", headers={"content-type": "text/plain"})
).read()
print(opened["AccessKeyId"], opened["SecretAccessKey"], opened["SessionToken"])
