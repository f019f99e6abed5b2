/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What the emulator tells of by itself: code translated and forgotten, processors that begin, interrupts and exceptions
 * delivered, the end. Up to version 6 of the interface the number of the plug-in comes first; from 7 on each has data
 * of its own, and there is no number.
 */
#include "recorder.h"

enum { INTERRUPT = 1, EXCEPTION = 2 };     /* discontinuities */

#if INTERFACE < 7

void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id, void (*f)(qemu_plugin_id_t, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_init_cb(qemu_plugin_id_t id, void (*f)(qemu_plugin_id_t, unsigned));
void qemu_plugin_register_flush_cb(qemu_plugin_id_t id, void (*f)(qemu_plugin_id_t));
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t id, void (*f)(qemu_plugin_id_t, void *), void *data);
__attribute__((weak))           /* since 10.2 */
void qemu_plugin_register_vcpu_discon_cb(qemu_plugin_id_t id, int types,
                                         void (*f)(qemu_plugin_id_t, unsigned, int, uint64_t, uint64_t));

static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
    (void)id;
    core_translated(tb);
}

static void on_vcpu(qemu_plugin_id_t id, unsigned vcpu)
{
    (void)id;
    backend_begins(vcpu);
}

static void on_flush(qemu_plugin_id_t id)
{
    (void)id;
    core_forgotten();
}

static void on_end(qemu_plugin_id_t id, void *data)
{
    (void)id, (void)data;
    stream_end();
}

static void on_discontinuity(qemu_plugin_id_t id, unsigned vcpu, int type, uint64_t from, uint64_t to)
{
    (void)id, (void)to;
    core_delivered(vcpu, type == EXCEPTION, from);
}

void events_install(qemu_plugin_id_t id)
{
    qemu_plugin_register_vcpu_init_cb(id, on_vcpu);
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
    qemu_plugin_register_flush_cb(id, on_flush);
    qemu_plugin_register_atexit_cb(id, on_end, NULL);
    tells_delivery = qemu_plugin_register_vcpu_discon_cb != NULL;
    if (tells_delivery)
        qemu_plugin_register_vcpu_discon_cb(id, INTERRUPT | EXCEPTION, on_discontinuity);
}

#else

void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id, void (*f)(struct qemu_plugin_tb *, void *), void *data);
void qemu_plugin_register_vcpu_init_cb(qemu_plugin_id_t id, void (*f)(unsigned, void *), void *data);
void qemu_plugin_register_flush_cb(qemu_plugin_id_t id, void (*f)(void *), void *data);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t id, void (*f)(void *), void *data);
void qemu_plugin_register_vcpu_discon_cb(qemu_plugin_id_t id, int types,
                                         void (*f)(unsigned, int, uint64_t, uint64_t, void *), void *data);

static void on_translation(struct qemu_plugin_tb *tb, void *data)
{
    (void)data;
    core_translated(tb);
}

static void on_vcpu(unsigned vcpu, void *data)
{
    (void)data;
    backend_begins(vcpu);
}

static void on_flush(void *data)
{
    (void)data;
    core_forgotten();
}

static void on_end(void *data)
{
    (void)data;
    stream_end();
}

static void on_discontinuity(unsigned vcpu, int type, uint64_t from, uint64_t to, void *data)
{
    (void)to, (void)data;
    core_delivered(vcpu, type == EXCEPTION, from);
}

void events_install(qemu_plugin_id_t id)
{
    qemu_plugin_register_vcpu_init_cb(id, on_vcpu, NULL);
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation, NULL);
    qemu_plugin_register_flush_cb(id, on_flush, NULL);
    qemu_plugin_register_atexit_cb(id, on_end, NULL);
    qemu_plugin_register_vcpu_discon_cb(id, INTERRUPT | EXCEPTION, on_discontinuity, NULL);
    tells_delivery = true;
}

#endif
