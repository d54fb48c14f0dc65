"""Makes, tags and removes EKS clusters in moto; credentials come from the environment.

usage: eks.py MOTO_URL REGION create|tag|untag|delete NAME [KEY=VALUE...]
"""
import sys

import boto3

url, region, what, name, *pairs = sys.argv[1:]
eks = boto3.client("eks", region_name=region, endpoint_url=url)
tags = dict(pair.split("=", 1) for pair in pairs)
if what == "create":
    eks.create_cluster(
        name=name,
        roleArn="arn:aws:iam::123456789012:role/eks",
        resourcesVpcConfig={"subnetIds": ["subnet-1", "subnet-2"]},
        tags=tags,
    )
elif what == "delete":
    eks.delete_cluster(name=name)
else:
    arn = eks.describe_cluster(name=name)["cluster"]["arn"]
    if what == "tag":
        eks.tag_resource(resourceArn=arn, tags=tags)
    else:
        eks.untag_resource(resourceArn=arn, tagKeys=list(tags))
