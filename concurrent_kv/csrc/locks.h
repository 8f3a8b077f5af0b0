/* `ShardLocks`: fair reader-writer locks by number, each of them nothing but a count, a flag and a queue. Their
 * counterpart is in `locks/sharded.py`; `locks/shards.py` says what both promise.
 *
 * No exception from outside can part the taking of a lock from the note that it is taken: both happen in C. Whoever lets
 * go hands a lock to the first in its queue, and to the readers right behind a reader; who comes while others wait
 * joins the queue.
 */

#ifndef CONCURRENT_KV_LOCKS_H
#define CONCURRENT_KV_LOCKS_H

#include "arguments.h"

typedef struct HeldStruct Held;

typedef struct {
    Py_ssize_t readers; /* that have it */
    int written;        /* whether a writer has it */
    Held *first, *last; /* of those that wait */
} Shard;

typedef struct {
    PyObject_HEAD
    Py_ssize_t count, held; /* held: how many `Held` are inside */
    Shard *shards;
    PyObject *contention; /* its `wait_until` waits, and counts that */
} ShardLocks;

/* Shards of one `with`. What belongs to the locks is changed in their critical section, by any thread. */
struct HeldStruct {
    PyObject_HEAD
    ShardLocks *locks;
    PyObject *deadline;
    int write;
    int inside;  /* OUTSIDE, ENTERING or INSIDE */
    int waiting; /* in the queue of the shard after those taken */
    Py_ssize_t wanted, taken;
    Py_ssize_t one, *shards; /* `shards` is `&one` where it is one */
    Held *before, *after;
    PyThread_type_lock bell; /* locked, until the shard that is waited for is handed over */
};

enum { OUTSIDE, ENTERING, INSIDE };

static PyTypeObject *shard_locks_type, *held_type;

static int is_free_for(const Shard *shard, const Held *held)
{
    return !shard->written && (!held->write || shard->readers == 0);
}

static void give(Shard *shard, Held *held)
{
    if (held->write)
        shard->written = 1;
    else
        shard->readers++;
    held->taken++;
}

static void unlink_waiting(Shard *shard, Held *held)
{
    *(held->before ? &held->before->after : &shard->first) = held->after;
    *(held->after ? &held->after->before : &shard->last) = held->before;
    held->before = held->after = NULL;
    held->waiting = 0;
}

/* Hand a shard to those at the head of its queue that can have it. */
static void hand_over(Shard *shard)
{
    while (shard->first != NULL && is_free_for(shard, shard->first)) {
        Held *next = shard->first;
        unlink_waiting(shard, next);
        give(shard, next);
        PyThread_release_lock(next->bell);
    }
}

enum { TAKEN, WAITING, LACKS_BELL };

/* Take the shards that are left, up to one that has to be waited for; that one's queue is joined. */
static int take_or_wait(Held *held)
{
    while (held->taken < held->wanted) {
        Shard *shard = held->locks->shards + held->shards[held->taken];
        if (shard->first == NULL && is_free_for(shard, held)) {
            give(shard, held);
            continue;
        }
        if (held->bell == NULL)
            return LACKS_BELL;
        PyThread_acquire_lock(held->bell, NOWAIT_LOCK);
        held->before = shard->last;
        *(shard->last ? &shard->last->after : &shard->first) = held;
        shard->last = held;
        held->waiting = 1;
        return WAITING;
    }
    return TAKEN;
}

/* Give back what is taken, and a place in a queue. */
static void leave(Held *held)
{
    Shard *shards = held->locks->shards;
    if (held->waiting) {
        Shard *shard = shards + held->shards[held->taken];
        unlink_waiting(shard, held);
        hand_over(shard);
    }
    while (held->taken > 0) {
        Shard *shard = shards + held->shards[--held->taken];
        if (held->write)
            shard->written = 0;
        else
            shard->readers--;
        hand_over(shard);
    }
    if (held->inside) {
        held->inside = OUTSIDE;
        held->locks->held--;
    }
}

static void leave_locked(Held *held)
{
    Py_BEGIN_CRITICAL_SECTION(held->locks);
    leave(held);
    Py_END_CRITICAL_SECTION();
}

/* Wait, in Python, for the next shard. */
static int wait_for_next(Held *held, Py_ssize_t shard)
{
    PyObject *is_free = PyObject_GetAttrString((PyObject *)held, "wait");
    PyObject *result = NULL;
    if (is_free != NULL)
        result = PyObject_CallMethod(held->locks->contention, "wait_until", "OnOO", is_free, shard,
                                     held->write ? Py_True : Py_False, held->deadline);
    Py_XDECREF(is_free);
    if (result == NULL)
        return 0;
    Py_DECREF(result);
    int waiting;
    Py_BEGIN_CRITICAL_SECTION(held->locks);
    waiting = held->waiting;
    Py_END_CRITICAL_SECTION();
    if (waiting)
        PyErr_SetString(PyExc_RuntimeError, "the wait has ended before the shard was free");
    return !waiting;
}

static PyObject *held_enter(Held *held, PyObject *unused)
{
    int was;
    Py_BEGIN_CRITICAL_SECTION(held->locks);
    was = held->inside;
    if (was == OUTSIDE) {
        held->inside = ENTERING;
        held->locks->held++;
    }
    Py_END_CRITICAL_SECTION();
    if (was != OUTSIDE) {
        PyErr_SetString(PyExc_RuntimeError, "these shards are held already");
        return NULL;
    }
    for (;;) {
        int outcome;
        Py_ssize_t next = -1; /* read here: once the section is over, the shard may be handed over */
        Py_BEGIN_CRITICAL_SECTION(held->locks);
        outcome = take_or_wait(held);
        if (outcome == TAKEN)
            held->inside = INSIDE;
        else
            next = held->shards[held->taken];
        Py_END_CRITICAL_SECTION();
        if (outcome == TAKEN)
            Py_RETURN_NONE;
        if (outcome == LACKS_BELL) {
            PyThread_type_lock bell = PyThread_allocate_lock();
            if (bell == NULL) {
                PyErr_NoMemory();
                break;
            }
            Py_BEGIN_CRITICAL_SECTION(held->locks);
            held->bell = bell;
            Py_END_CRITICAL_SECTION();
        } else if (!wait_for_next(held, next))
            break;
    }
    leave_locked(held);
    return NULL;
}

static PyObject *held_exit(Held *held, PyObject *const *arguments, Py_ssize_t count)
{
    int entering;
    Py_BEGIN_CRITICAL_SECTION(held->locks);
    entering = held->inside == ENTERING;
    if (!entering)
        leave(held);
    Py_END_CRITICAL_SECTION();
    if (entering) { /* who waits would take them after this, and hold them unknown to `inside` */
        PyErr_SetString(PyExc_RuntimeError, "these shards are still waited for");
        return NULL;
    }
    Py_RETURN_NONE;
}

/* wait(seconds): whether the shard has been handed over, at the latest after so many seconds. */
static PyObject *held_wait(Held *held, PyObject *seconds)
{
    double left = PyFloat_AsDouble(seconds);
    if (left == -1.0 && PyErr_Occurred())
        return NULL;
    int waiting;
    PyThread_type_lock bell; /* lives as long as the hold */
    Py_BEGIN_CRITICAL_SECTION(held->locks);
    waiting = held->waiting;
    bell = held->bell;
    Py_END_CRITICAL_SECTION();
    if (!waiting) /* the bell may be locked for good */
        Py_RETURN_TRUE;
    PY_TIMEOUT_T microseconds = left > 0 ? (PY_TIMEOUT_T)((left < 1e6 ? left : 1e6) * 1e6) : 0;
    Py_BEGIN_ALLOW_THREADS
    PyThread_acquire_lock_timed(bell, microseconds, 1); /* a signal ends it: its handler runs in the caller */
    Py_END_ALLOW_THREADS
    Py_BEGIN_CRITICAL_SECTION(held->locks);
    waiting = held->waiting;
    Py_END_CRITICAL_SECTION();
    return PyBool_FromLong(!waiting);
}

/* A deadline may name the hold that it is for. Nothing is cleared here: what else such a circle goes through clears it. */
static int held_traverse(Held *held, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(held));
    Py_VISIT(held->locks);
    Py_VISIT(held->deadline);
    return 0;
}

static void held_dealloc(Held *held)
{
    PyTypeObject *type = Py_TYPE(held);
    PyObject_GC_UnTrack(held);
    if (held->locks != NULL && held->inside != OUTSIDE)
        leave_locked(held);
    if (held->bell != NULL) {
        PyThread_acquire_lock(held->bell, NOWAIT_LOCK);
        PyThread_release_lock(held->bell);
        PyThread_free_lock(held->bell);
    }
    if (held->shards != &held->one)
        PyMem_Free(held->shards);
    Py_XDECREF(held->deadline);
    Py_XDECREF(held->locks);
    type->tp_free(held);
    Py_DECREF(type);
}

/* Copy numbers of shards, which must be in ascending order; 0 with an exception where they are not. */
static int shards_of(Held *held, PyObject *shards)
{
    PyObject *numbers = PySequence_Fast(shards, "shards must be a sequence of ints");
    if (numbers == NULL)
        return 0;
    Py_BEGIN_CRITICAL_SECTION(numbers); /* a list may be changed by another thread */
    held->wanted = PySequence_Fast_GET_SIZE(numbers);
    if (held->wanted > 1)
        held->shards = PyMem_Malloc(held->wanted * sizeof(Py_ssize_t));
    if (held->shards == NULL) {
        held->shards = &held->one;
        PyErr_NoMemory();
    }
    for (Py_ssize_t i = 0; !PyErr_Occurred() && i < held->wanted; i++) {
        Py_ssize_t shard = held->shards[i] = PyLong_AsSsize_t(PySequence_Fast_GET_ITEM(numbers, i));
        if (shard == -1 && PyErr_Occurred())
            break;
        if (shard < 0 || shard >= held->locks->count)
            PyErr_Format(PyExc_IndexError, "shards must be from 0 to %zd, got %zd", held->locks->count - 1, shard);
        else if (i > 0 && shard <= held->shards[i - 1])
            PyErr_SetString(PyExc_ValueError, "shards must be in ascending order, each once");
    }
    Py_END_CRITICAL_SECTION();
    Py_DECREF(numbers);
    return !PyErr_Occurred();
}

static PyObject *new_held(ShardLocks *locks, PyObject *const *arguments, Py_ssize_t count, int write)
{
    if (!enough(count, 2))
        return NULL;
    Held *held = (Held *)held_type->tp_alloc(held_type, 0);
    if (held == NULL)
        return NULL;
    held->shards = &held->one;
    held->locks = (ShardLocks *)Py_NewRef(locks);
    held->deadline = Py_NewRef(arguments[1]);
    held->write = write;
    if (!shards_of(held, arguments[0])) {
        Py_DECREF(held);
        return NULL;
    }
    return (PyObject *)held;
}

static PyObject *shard_locks_read(ShardLocks *locks, PyObject *const *arguments, Py_ssize_t count)
{
    return new_held(locks, arguments, count, 0);
}

static PyObject *shard_locks_write(ShardLocks *locks, PyObject *const *arguments, Py_ssize_t count)
{
    return new_held(locks, arguments, count, 1);
}

static PyObject *shard_locks_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"count", "contention", NULL};
    Py_ssize_t count;
    PyObject *contention;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "nO", names, &count, &contention))
        return NULL;
    if (count < 1) {
        PyErr_Format(PyExc_ValueError, "count must be at least 1, got %zd", count);
        return NULL;
    }
    ShardLocks *locks = (ShardLocks *)type->tp_alloc(type, 0);
    if (locks == NULL)
        return NULL;
    locks->count = count;
    locks->contention = Py_NewRef(contention);
    locks->shards = PyMem_Calloc(count, sizeof(Shard));
    if (locks->shards == NULL) {
        Py_DECREF(locks);
        return PyErr_NoMemory();
    }
    return (PyObject *)locks;
}

static int shard_locks_traverse(ShardLocks *locks, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(locks));
    Py_VISIT(locks->contention);
    return 0;
}

static void shard_locks_dealloc(ShardLocks *locks)
{
    PyTypeObject *type = Py_TYPE(locks);
    PyObject_GC_UnTrack(locks);
    PyMem_Free(locks->shards);
    Py_XDECREF(locks->contention);
    type->tp_free(locks);
    Py_DECREF(type);
}

static PyObject *shard_locks_count(ShardLocks *locks, void *closure)
{
    return PyLong_FromSsize_t(locks->count);
}

static PyObject *shard_locks_contention(ShardLocks *locks, void *closure)
{
    return Py_NewRef(locks->contention);
}

static PyObject *shard_locks_held(ShardLocks *locks, void *closure)
{
    Py_ssize_t held;
    Py_BEGIN_CRITICAL_SECTION(locks);
    held = locks->held;
    Py_END_CRITICAL_SECTION();
    return PyLong_FromSsize_t(held);
}

static PyMethodDef held_methods[] = {
    {"__enter__", (PyCFunction)held_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)(void (*)(void))held_exit, METH_FASTCALL, NULL},
    {"wait", (PyCFunction)held_wait, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMethodDef shard_locks_methods[] = {
    METHOD(shard_locks, read, METH_FASTCALL), METHOD(shard_locks, write, METH_FASTCALL), {NULL, NULL, 0, NULL},
};

static PyGetSetDef shard_locks_fields[] = {
    {"count", (getter)shard_locks_count, NULL, NULL, NULL},
    {"contention", (getter)shard_locks_contention, NULL, NULL, NULL},
    {"held", (getter)shard_locks_held, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot held_slots[] = {
    {Py_tp_dealloc, held_dealloc}, {Py_tp_traverse, held_traverse}, {Py_tp_methods, held_methods}, {0, NULL},
};

static PyType_Slot shard_locks_slots[] = {
    {Py_tp_new, shard_locks_new},
    {Py_tp_dealloc, shard_locks_dealloc},
    {Py_tp_traverse, shard_locks_traverse},
    {Py_tp_methods, shard_locks_methods},
    {Py_tp_getset, shard_locks_fields},
    {0, NULL},
};

static PyType_Spec held_spec = {
    "concurrent_kv._native.Held", sizeof(Held), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION, held_slots,
};

static PyType_Spec shard_locks_spec = {
    "concurrent_kv._native.ShardLocks", sizeof(ShardLocks), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    shard_locks_slots,
};

#endif
