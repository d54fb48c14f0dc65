"""Makes an EKS cluster with the tag `env`.

usage: eks_cluster.py ENDPOINT NAME ENV
"""
import sys

import boto3

endpoint, name, env = sys.argv[1:]
boto3.client("eks", endpoint_url=endpoint, region_name="us-east-1").create_cluster(
    name=name,
    roleArn="arn:aws:iam::123456789012:role/eks",
    resourcesVpcConfig={"subnetIds": []},
    tags={"env": env},
)
