/* What the functions are called with: numbers, arrays, rows of the slot tables, slots; checked before they are used. */

#ifndef CONCURRENT_KV_ARGUMENTS_H
#define CONCURRENT_KV_ARGUMENTS_H

#include <Python.h>
#include <stdint.h>
#include <string.h>

#ifndef Py_BEGIN_CRITICAL_SECTION /* without it, the GIL keeps the threads apart */
#define Py_BEGIN_CRITICAL_SECTION(object) {
#define Py_END_CRITICAL_SECTION() }
#endif

/* An entry of a type's table of methods. */
#define METHOD(prefix, name, flags) {#name, (PyCFunction)(void (*)(void))prefix##_##name, flags, NULL}

/* A name of an attribute, made when the module is imported, which one thread does; 0 with an exception set. */
static int intern(PyObject **name, const char *text)
{
    return *name != NULL || (*name = PyUnicode_InternFromString(text)) != NULL;
}

static int enough(Py_ssize_t count, Py_ssize_t expected)
{
    if (count == expected)
        return 1;
    PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, count);
    return 0;
}

static int integers(PyObject *const *arguments, Py_ssize_t count, Py_ssize_t *out)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        out[i] = PyLong_AsSsize_t(arguments[i]);
        if (out[i] == -1 && PyErr_Occurred())
            return 0;
    }
    return 1;
}

/* A C contiguous array; `kinds` are the formats of its items that are accepted. Releasing a view of none is harmless. */
static int array_of(PyObject *object, Py_buffer *view, int dimensions, const char *kinds, int flags)
{
    if (PyObject_GetBuffer(object, view, PyBUF_ND | PyBUF_FORMAT | flags) < 0) {
        view->obj = NULL;
        return 0;
    }
    if (view->ndim == dimensions && strlen(view->format) == 1 && strchr(kinds, view->format[0]) != NULL)
        return 1;
    PyErr_Format(PyExc_ValueError, "expected an array of %d dimensions of '%s', got %d of '%s'", dimensions, kinds,
                 view->ndim, view->format);
    PyBuffer_Release(view);
    return 0;
}

#define INT64 (sizeof(long) == 8 ? "lq" : "q")
#define INT32 (sizeof(long) == 4 ? "il" : "i")

static int within(int64_t index, Py_ssize_t bound, const char *what)
{
    if (index >= 0 && index < bound)
        return 1;
    PyErr_Format(PyExc_IndexError, "%s must be less than %zd, got %lld", what, bound, (long long)index);
    return 0;
}

static int all_within(const Py_buffer *view, Py_ssize_t bound, const char *what)
{
    const int64_t *index = view->buf;
    for (Py_ssize_t i = 0; i < view->len / 8; i++)
        if (!within(index[i], bound, what))
            return 0;
    return 1;
}

/* A list of row numbers, ints, as an array of its own, which the caller frees. Other numbers could change the list. */
static int64_t *rows_of(PyObject *list, Py_ssize_t bound, Py_ssize_t *count)
{
    if (!PyList_Check(list)) {
        PyErr_Format(PyExc_TypeError, "rows must be a list, got %s", Py_TYPE(list)->tp_name);
        return NULL;
    }
    *count = PyList_GET_SIZE(list);
    int64_t *rows = PyMem_Malloc((*count + 1) * sizeof(int64_t));
    if (rows == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    for (Py_ssize_t i = 0; i < *count; i++) {
        PyObject *row = PyList_GET_ITEM(list, i);
        if (!PyLong_Check(row))
            PyErr_Format(PyExc_TypeError, "rows must be ints, got %s", Py_TYPE(row)->tp_name);
        rows[i] = PyLong_Check(row) ? PyLong_AsLongLong(row) : -1;
        if ((rows[i] == -1 && PyErr_Occurred()) || !within(rows[i], bound, "row")) {
            PyMem_Free(rows);
            return NULL;
        }
    }
    return rows;
}

/* Slots: an int64 array, or a range of step 1. */
typedef struct {
    Py_buffer view; /* of none for a range */
    const int64_t *array;
    int64_t first;
    Py_ssize_t count;
} Slots;

static inline int64_t slot_of(const Slots *slots, Py_ssize_t i)
{
    return slots->array == NULL ? slots->first + i : slots->array[i];
}

static int slots_of(PyObject *object, Slots *slots, Py_ssize_t bound)
{
    slots->view.obj = NULL;
    slots->array = NULL;
    if (!PyRange_Check(object)) {
        if (!array_of(object, &slots->view, 1, INT64, 0))
            return 0;
        slots->array = slots->view.buf;
        slots->count = slots->view.shape[0];
        if (all_within(&slots->view, bound, "slot"))
            return 1;
        PyBuffer_Release(&slots->view);
        return 0;
    }
    slots->count = PyObject_Length(object);
    if (slots->count < 1)
        return slots->count == 0;
    PyObject *ends[2] = {PySequence_GetItem(object, 0), PySequence_GetItem(object, slots->count - 1)};
    int64_t numbers[2] = {-1, -1};
    for (int i = 0; i < 2; i++) {
        if (ends[i] != NULL)
            numbers[i] = PyLong_AsLongLong(ends[i]);
        Py_XDECREF(ends[i]);
    }
    if (PyErr_Occurred() || !within(numbers[0], bound, "slot") || !within(numbers[1], bound, "slot"))
        return 0;
    slots->first = numbers[0];
    if (numbers[1] - numbers[0] == slots->count - 1)
        return 1;
    PyErr_SetString(PyExc_ValueError, "a range of slots must have step 1");
    return 0;
}

#endif
