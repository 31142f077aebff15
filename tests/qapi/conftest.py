"""A small schema with every kind of definition, named after the wire that qmpd speaks."""

from __future__ import annotations

import pytest

from qmpd.qapi import Schema, loads

TEXT = """
{ 'enum': 'Driver', 'data': [ 'file', 'raw', 'null-co', 'quorum', 'qcow2',
    { 'name': 'old', 'features': [ 'deprecated' ] }, 'plain' ] }
{ 'enum': 'Discard', 'data': [ 'ignore', 'unmap' ] }
{ 'struct': 'Cache', 'data': { '*direct': 'bool', '*no-flush': 'bool' } }
{ 'struct': 'OptionsFile', 'data': { 'filename': 'str', '*offset-list': ['int'] } }
{ 'struct': 'OptionsFormat', 'data': { 'file': 'Ref' } }
{ 'struct': 'OptionsRaw', 'base': 'OptionsFormat', 'data': { '*offset': 'int', '*length': 'size' } }
{ 'struct': 'OptionsNull', 'data': { '*size': 'int', '*latency-ns': 'uint64', '*read-zeroes': 'bool' } }
{ 'struct': 'OptionsQuorum', 'data': { 'children': ['Ref'], 'vote-threshold': 'int' } }
{ 'struct': 'OptionsQcow2', 'base': 'OptionsFormat',
  'data': { '*backing': 'RefOrNull', '*overlap-check': 'OverlapChecks', '*encrypt': 'Encrypt' } }
{ 'union': 'Encrypt', 'base': { 'format': 'EncryptFormat' }, 'discriminator': 'format',
  'data': { 'luks': 'EncryptLUKS' } }
{ 'enum': 'EncryptFormat', 'data': [ 'aes', 'luks' ] }
{ 'struct': 'EncryptLUKS', 'data': { '*key-secret': 'str' } }
{ 'struct': 'OverlapFlags', 'data': { '*template': 'OverlapMode', '*main-header': 'bool' } }
{ 'enum': 'OverlapMode', 'data': [ 'none', 'all' ] }
{ 'alternate': 'OverlapChecks', 'data': { 'flags': 'OverlapFlags', 'mode': 'OverlapMode' } }
##
# @Options:
#
# A node of the graph.
#
# @driver: what kind of node
##
{ 'union': 'Options',
  'base': { 'driver': 'Driver', '*node-name': 'str', '*discard': 'Discard', '*cache': 'Cache' },
  'discriminator': 'driver',
  'data': { 'file': 'OptionsFile', 'old': 'OptionsFile', 'raw': 'OptionsRaw', 'null-co': 'OptionsNull',
            'quorum': 'OptionsQuorum', 'qcow2': 'OptionsQcow2' } }
{ 'alternate': 'Ref', 'data': { 'definition': 'Options', 'reference': 'str' } }
{ 'alternate': 'RefOrNull', 'data': { 'definition': 'Options', 'reference': 'str', 'null': 'null' } }
{ 'alternate': 'IntOrText', 'data': { 'i': 'int', 's': 'str', 'l': ['str'] } }
{ 'command': 'blockdev-add', 'data': 'Options', 'boxed': true }
{ 'command': 'create', 'data': { 'job-id': 'str', 'options': 'Options' } }
{ 'command': 'nothing', 'returns': 'int', 'allow-oob': true }
{ 'command': 'maybe', 'data': { '*flat': 'bool' }, 'returns': ['Measured'] }
{ 'struct': 'Measured', 'data': { 'name': 'str', '*nested': ['Measured'], '*rate': 'number' } }
{ 'enum': 'Capability', 'data': [ 'oob' ] }
{ 'command': 'negotiate', 'data': { '*enable': [ 'Capability' ] } }
{ 'command': 'device_add', 'data': { 'driver': 'str', '*id': 'str' }, 'gen': false,
  'features': [ 'json-cli' ] }
{ 'struct': 'Numbers', 'data': { '*i8': 'int8', '*u8': 'uint8', '*i16': 'int16', '*u16': 'uint16',
  '*i32': 'int32', '*u32': 'uint32', '*i64': 'int64', '*u64': 'uint64', '*int': 'int', '*size': 'size',
  '*number': 'number', '*u16s': ['uint16'], '*nothing': 'null', '*any': 'any', '*either': 'IntOrText',
  '*lists': [ 'Lists' ] } }
{ 'struct': 'Lists', 'data': { 'names': ['str'] } }
{ 'command': 'count', 'data': 'Numbers' }
{ 'event': 'CHANGED', 'data': { 'id': 'str', '*status': 'OverlapMode' } }
{ 'event': 'RESET' }
"""


@pytest.fixture(scope="session")
def schema() -> Schema:
    return loads(TEXT, "small.json")
