/* `hash_rows` and `hash_memory`: keys of states. Their counterpart is in `model/hashing.py`. */

#ifndef CONCURRENT_KV_HASHES_H
#define CONCURRENT_KV_HASHES_H

#include "arguments.h"

/* XXH64 as specified in https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md, with seed 0. */
#define PRIME_1 0x9E3779B185EBCA87ULL
#define PRIME_2 0xC2B2AE3D27D4EB4FULL
#define PRIME_3 0x165667B19E3779F9ULL
#define PRIME_4 0x85EBCA77C2B2AE63ULL
#define PRIME_5 0x27D4EB2F165667C5ULL

static inline uint64_t rotated(uint64_t value, int bits)
{
    return value << bits | value >> (64 - bits);
}

static inline uint64_t word(const unsigned char *at, int bytes)
{
    uint64_t value = 0;
    for (int i = 0; i < bytes; i++)
        value |= (uint64_t)at[i] << (8 * i);
    return value;
}

static inline uint64_t one_round(uint64_t lane, uint64_t input)
{
    return rotated(lane + input * PRIME_2, 31) * PRIME_1;
}

static uint64_t xxh64(const unsigned char *at, Py_ssize_t bytes)
{
    const unsigned char *end = at + bytes;
    uint64_t hash = PRIME_5;
    if (bytes >= 32) {
        uint64_t lanes[4] = {PRIME_1 + PRIME_2, PRIME_2, 0, 0 - PRIME_1};
        for (; end - at >= 32; at += 32)
            for (int i = 0; i < 4; i++)
                lanes[i] = one_round(lanes[i], word(at + 8 * i, 8));
        hash = rotated(lanes[0], 1) + rotated(lanes[1], 7) + rotated(lanes[2], 12) + rotated(lanes[3], 18);
        for (int i = 0; i < 4; i++)
            hash = (hash ^ one_round(0, lanes[i])) * PRIME_1 + PRIME_4;
    }
    hash += (uint64_t)bytes;
    for (; end - at >= 8; at += 8)
        hash = rotated(hash ^ one_round(0, word(at, 8)), 27) * PRIME_1 + PRIME_4;
    for (; end - at >= 4; at += 4)
        hash = rotated(hash ^ word(at, 4) * PRIME_1, 23) * PRIME_2 + PRIME_3;
    for (; at < end; at++)
        hash = rotated(hash ^ *at * PRIME_5, 11) * PRIME_1;
    hash = (hash ^ hash >> 33) * PRIME_2;
    hash = (hash ^ hash >> 29) * PRIME_3;
    return hash ^ hash >> 32;
}

static PyObject *hashes_of(const unsigned char *at, Py_ssize_t rows, Py_ssize_t bytes)
{
    if (rows < 0 || bytes < 0) {
        PyErr_SetString(PyExc_ValueError, "rows and bytes must not be negative");
        return NULL;
    }
    PyObject *hashes = PyList_New(rows);
    for (Py_ssize_t row = 0; hashes != NULL && row < rows; row++) {
        uint64_t hash = xxh64(at + row * bytes, bytes);
        PyObject *digits = PyUnicode_New(16, 127);
        if (digits == NULL)
            Py_CLEAR(hashes);
        else {
            for (int i = 15; i >= 0; i--, hash >>= 4)
                PyUnicode_1BYTE_DATA(digits)[i] = "0123456789abcdef"[hash & 15];
            PyList_SET_ITEM(hashes, row, digits);
        }
    }
    return hashes;
}

/* hash_rows(bytes, rows) -> the hash of each of `rows` rows of as many bytes, as 16 hexadecimal digits. */
static PyObject *hash_rows(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    Py_ssize_t rows;
    Py_buffer view;
    if (!enough(count, 2) || !integers(arguments + 1, 1, &rows) ||
        PyObject_GetBuffer(arguments[0], &view, PyBUF_SIMPLE) < 0)
        return NULL;
    PyObject *hashes = NULL;
    if (rows > 0 && view.len % rows)
        PyErr_Format(PyExc_ValueError, "%zd bytes are no %zd equal rows", view.len, rows);
    else
        hashes = hashes_of(view.buf, rows, rows ? view.len / rows : 0);
    PyBuffer_Release(&view);
    return hashes;
}

/* hash_memory(address, rows, bytes): as `hash_rows`, of rows of `bytes` bytes. */
static PyObject *hash_memory(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    Py_ssize_t numbers[2];
    if (!enough(count, 3) || !integers(arguments + 1, 2, numbers))
        return NULL;
    const unsigned char *at = PyLong_AsVoidPtr(arguments[0]);
    return PyErr_Occurred() ? NULL : hashes_of(at, numbers[0], numbers[1]);
}

#endif
